"""The two packages mirror each other: file by file, public names, argument names and shapes agree.

The tables below list the allowed differences with their reasons, and must list no others.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Files of the same name in both packages, except those that have only the name in common.
NOT_COMPARED = {
    "unchosen.py": "an optax transformation; torch's AdamW takes parameters without a gradient as they are",
    "optimizers.py": "optax is set up to take the step that torch.optim takes",
}
FILES = sorted(
    name for name in (str(file.relative_to(ROOT / "torch_ref")) for file in (ROOT / "torch_ref").rglob("*.py"))
    if (ROOT / "jax_moe" / name).exists() and not name.endswith("__init__.py") and name not in NOT_COMPARED
)
SHAPED = ("Bool", "Float", "Int", "Shaped", "Key")

# Arguments that only one framework needs, whatever the function.
JAX_ARGUMENTS = {
    "rngs": "torch draws initial weights from its global generator",
    "param_dtype": "torch modules are converted with .to(dtype)",
    "kernel_init": "torch modules are initialised after they are made",
    "key": "torch draws from its global generator",
    "training": "torch has module.train() and module.eval()",
    "capacity_limit": "torch has no fixed shapes: a growing prompt is simply longer",
}
TORCH_ARGUMENTS = {
    "training": "module.training, handed on to a pure function",
    "generator": "torch's way to a stream of random numbers",
}
# Public names of one side only: {file: {name or "Class.*": reason}}.
JAX_ONLY = {
    "dispatch.py": {
        "Moves.dropout": "in whatever shape a dispatcher holds answers; torch draws for one expert at a time",
        "Moves.keep": "see Moves.dropout",
        "einsum_dispatch": "the batched reference; torch loops (loop_dispatch)",
        "with_identity": "around any dispatcher; in torch experts that return their input stand in the list",
        "queue_positions": "positions of all choices at once; torch walks each expert's queue (expert_queue)",
    },
    "experts.py": {
        "Experts.*": "all experts in one stack; torch has one Expert each",
        "hidden_units": "shared by the fast paths; torch has it inside expert_ffn",
        "answer": "the norm of answers, for every dispatcher; torch wraps each expert (after)",
        "take_experts": "rows of the stack for the fast paths; torch indexes a list",
    },
    "moe.py": {
        "CorrectionBias.*": "torch has buffers",
        "ExpertTable.*": "torch has buffers",
        "Router.weight": "reads an nnx variable; torch parameters are tensors already",
    },
    "models/block.py": {
        "Block.run": "hands out stages and choices; in torch MakeMoE alone does",
        "BlockOutput.*": "see Block.run",
    },
    "activations.py": {
        "clamp_above": "torch.clamp has the wanted gradient at the bound", "soft_cap": "torch has it beside expert_ffn",
    },
    "arrays.py": {
        "check_limit": "torch has no capacity_limit",
        "moe_arrays": "jax checks under jit as well; torch has check_moe_arrays",
        "visible": "the decoders with padding stand in jax_moe alone",
    },
    "dropout.py": {"draw_keep": "torch draws from its global generator", "fold": "torch has no keys"},
    "norms.py": {
        "RMSNorm.*": "the Hugging Face decoders stand in jax_moe alone; their reference is transformers",
        "rms_norm": "see RMSNorm",
        "mixture_norm": "serves dispatchers, whose scales are stacked; torch has MixtureScale alone",
        "make_norm": "see RMSNorm",
        "layer_norm": "flax's LayerNorm with torch's settings; torch's are its defaults",
    },
}
TORCH_ONLY = {
    "routing.py": {"softplus": "torch's own stops being exact above its threshold"},
    "dispatch.py": {
        "loop_dispatch": "one expert after the other; jax has einsum_dispatch and kernels/",
        "expert_queue": "one expert's queue; jax has queue_positions",
    },
    "experts.py": {
        "Expert.*": "one expert; jax stacks them (Experts)",
        "linear": "computes in the input's dtype, as jax's einsum does",
        "Nothing.*": "an expert that answers nothing; jax adds nothing (with_identity)",
    },
    "losses.py": {"real_tokens": "picks rows by a mask; jax multiplies by it, for its shapes are fixed"},
    "moe.py": {
        "Parts.*": "the same forward serves modules with the original projects' names",
        "MoE.parts": "see Parts",
        "moe_logits": "see Parts",
        "after": "an expert with the norm of its answer; jax has answer",
        "weighed": "shared experts one after the other; jax has them in one stack",
        "make_norm": "None where the contract has no norm; in jax there is no attribute",
        "moe_routing": "see Parts",
        "moe_forward": "see Parts",
    },
    "norms.py": {"normed": "layer norm computed wide in bf16, as flax does"},
    "arrays.py": {"check_moe_arrays": "see moe_arrays"},
    "attention/multihead.py": {
        "Head.*": "makeMoE stores one module a head",
        "head_weights": "one head; jax has attention/products for all",
        "Attention.projected": "the two ways of storing projections, as a list of heads",
    },
    "models/block.py": {"block_forward": "serves Block and MakeMoEBlock, whose parameter names differ"},
    "generation/generate.py": {
        "router_noise": "draws the router's noise from the generator; jax folds keys",
    },
    "models/makemoe.py": {
        "ModelOutput.*": "jax has it where all models are walked (models/stack.py)",
        "NoisyTopkRouter.*": "the original project's state-dict names; jax stores its own and ports",
        "MakeMoEExpert.*": "as NoisyTopkRouter",
        "SparseMoE.*": "as NoisyTopkRouter",
        "MakeMoEBlock.*": "as NoisyTopkRouter",
    },
    "precision.py": {
        "role_of": "in jax a parameter carries its role",
        "call_in": "torch modules hold their weights; jax merges a cast tree",
        "torch_dtype": "torch's dtypes go by attribute",
    },
    "remat.py": {"keep_products": "a policy of torch.utils.checkpoint; jax has its own"},
}
# Same name, other arguments or shapes: {file: {"name" or "name(argument)": reason}}.
DIFFERENT = {
    "dispatch.py": {
        "Moves": "jax hands over one batched function, torch a list of experts",
        "single_answers": "torch has one dispatcher",
    },
    "experts.py": {
        "expert_ffn": "jax takes stacked weights by name, torch one expert's linear maps",
        "expert_ffn(return)": "all experts, or one",
    },
    "moe.py": {
        "MoE.run": "first_expert serves a step of generation",
        "Router": "an annotation that torch's typing of buffers needs",
        "MoE": "roles: in jax they stand on the parameters themselves",
    },
    "routing.py": {
        "choice_weights": "scores of shared experts come apart in jax; to torch these are further choices",
        "choice_weights(score_GSE)": "see choice_weights",
        "choice_weights(return)": "see choice_weights",
    },
    "soft_moe.py": {
        "SoftMoE": "roles: in jax they stand on the parameters themselves",
        "SoftExpert.forward": "jax maps one expert over E and keeps any leading dims",
        "SoftExpert.forward(return)": "as its argument",
    },
    "attention/multihead.py": {
        "Attention.__init__": "block_size makes the `tril` buffers of the original's state dict"
    },
    "precision.py": {"cast_to_compute": "jax casts a tree, torch a module's parameters"},
    "generation/generate.py": {
        "generate": "jax also serves the Hugging Face decoders: padding, stop tokens, a callback",
        "generate(tokens_BT)": "jax also takes numpy tokens",
    },
    "generation/sampling.py": {
        "check_sampling": "without a key jax cannot sample",
        "choose_tokens(return)": "torch keeps the dim, to append it",
        "choose_tokens(temperature)": "traced in jax",
    },
    "models/makemoe.py": {
        "MakeMoE.check_tokens(tokens_BT)": "jax also looks at numpy tokens, before they become int32",
        "kaiming_normal": "jax returns an array; torch fills a module",
    },
}


@dataclass
class Signature:
    """Argument names in order, the names with a shape and that shape (`return` for the answer)."""

    arguments: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[str, ...]] = field(default_factory=dict)


def shapes_in(annotation: ast.expr | None) -> tuple[str, ...]:
    """Float[Array, "B T D"] -> ("Float B T D",), in order of appearance; empty without a shape."""
    if annotation is None:
        return ()
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return shapes_in(ast.parse(annotation.value, mode="eval").body)
    found: list[str] = []
    named = isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name)
    if named and annotation.value.id in SHAPED:
        assert isinstance(annotation.slice, ast.Tuple)
        shape = annotation.slice.elts[1]
        assert isinstance(shape, ast.Constant)
        return (f"{annotation.value.id} {str(shape.value).strip()}",)
    for child in ast.iter_child_nodes(annotation):
        if isinstance(child, ast.expr):
            found.extend(shapes_in(child))
    return tuple(found)


def signature(node: ast.FunctionDef) -> Signature:
    """The signature of a function or method, without self."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments = [argument for argument in arguments if argument.arg not in ("self", "cls")]
    shapes = {argument.arg: shapes_in(argument.annotation) for argument in arguments}
    return Signature([a.arg for a in arguments], shapes | {"return": shapes_in(node.returns)})


def public(path: Path) -> dict[str, Signature]:
    """Functions, classes, methods, and the fields of tuples, by name; `__call__` is named `forward`."""
    found: dict[str, Signature] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found[node.name] = Signature()
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    found[node.name].arguments.append(item.target.id)
                    found[node.name].shapes[item.target.id] = shapes_in(item.annotation)
                elif (
                    isinstance(item, ast.FunctionDef) and (item.name[0] != "_" or item.name in ("__init__", "__call__"))
                ):
                    name = "forward" if item.name == "__call__" else item.name
                    found[f"{node.name}.{name}"] = signature(item)
    return found


def differences(ours: dict[str, Signature], theirs: dict[str, Signature]) -> tuple[set[str], set[str], dict[str, str]]:
    """(names in JAX only, names in torch only, {name or name(argument): how it differs})."""
    changed: dict[str, str] = {}
    for name in sorted(set(ours) & set(theirs)):
        mine = [a for a in ours[name].arguments if a not in JAX_ARGUMENTS]
        other = [a for a in theirs[name].arguments if a not in TORCH_ARGUMENTS]
        if mine != other:
            changed[name] = f"arguments {mine} and {other}"
        for argument in sorted(set(ours[name].shapes) & set(theirs[name].shapes)):
            a, b = ours[name].shapes[argument], theirs[name].shapes[argument]
            if a != b and argument not in JAX_ARGUMENTS:
                changed[f"{name}({argument})"] = f"shapes {a} and {b}"
    return set(ours) - set(theirs), set(theirs) - set(ours), changed


def folded(names: set[str]) -> set[str]:
    """The names, with a class of one side and its methods written as "Class.*"."""
    classes = {name for name in names if name[0].isupper() and "." not in name}
    return {name for name in names if name.split(".")[0] not in classes} | {f"{name}.*" for name in classes}


@pytest.mark.parametrize("file", FILES)
def test_file_says_the_same(file: str) -> None:
    jax_only, torch_only, changed = differences(public(ROOT / "jax_moe" / file), public(ROOT / "torch_ref" / file))
    assert folded(jax_only) == set(JAX_ONLY.get(file, {})), "names in jax_moe alone"
    assert folded(torch_only) == set(TORCH_ONLY.get(file, {})), "names in torch_ref alone"
    assert set(changed) == set(DIFFERENT.get(file, {})), f"differing: {changed}"


def test_tables_name_no_file_that_is_not_compared() -> None:
    assert {*JAX_ONLY, *TORCH_ONLY, *DIFFERENT} <= set(FILES)
    assert len(FILES) >= 18 and all((ROOT / "torch_ref" / name).exists() for name in NOT_COMPARED)


def test_letters_are_one_glossary() -> None:
    """dims.py explains the same letters; the words may differ where torch has no devices."""

    def letters(path: Path) -> set[str]:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        return {
            word
            for line in text.splitlines()
            for word in line.split()
            if len(word) == 1 and word.isupper() and word != "A"
        }

    assert letters(ROOT / "jax_moe/dims.py") == letters(ROOT / "torch_ref/dims.py") != set()


def test_a_difference_is_seen() -> None:
    ours = {"f": Signature(["x_BT", "size"], {"x_BT": ("Float B T",), "return": ("Float B",)}), "g": Signature()}
    theirs = {"f": Signature(["x_BT", "width"], {"x_BT": ("Float T B",), "return": ("Float B",)}), "h": Signature()}
    jax_only, torch_only, changed = differences(ours, theirs)
    assert (jax_only, torch_only) == ({"g"}, {"h"})
    assert changed == {
        "f": "arguments ['x_BT', 'size'] and ['x_BT', 'width']", "f(x_BT)": "shapes ('Float B T',) and ('Float T B',)",
    }
