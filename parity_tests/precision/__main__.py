"""docs/precision.md: errors of outputs and gradients in each framework and precision, and what flipped choices cost.

`python -m parity_tests.precision` measures, then writes the page's tables and its plot. The truth is PyTorch in fp64,
its weights and inputs representable in fp32. "mixed" is bf16 with the router's weights and arithmetic in fp32, as with
fp32 master weights. Long because it measures, plots and writes one page.
"""

import dataclasses
import datetime
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jax_moe
import torch_ref
from jax_moe import presets
from jax_moe.porting.families.mixtral import MIXTRAL
from moe_parity.relative import norm, relative_error
from moe_parity.sides.jax_moe import tap_model
from moe_parity.sides.transformers import widened
from moe_parity.stages import Place
from parity_tests.shared.filled import filled
from parity_tests.table.sides import tensor

ROOT = Path(__file__).parents[2]
PAGE, PLOT = ROOT / "docs" / "precision.md", ROOT / "docs" / "precision.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MODES = ("float64", "float32", "bfloat16", "mixed")
DTYPE = {"float64": jnp.float64, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "mixed": jnp.bfloat16}
LAYER = presets.mixtral(model_dim=64, expert_dim=128, num_experts=8, top_k=2)
MODEL = jax_moe.MakeMoEConfig(vocab_size=65, block_size=32, model_dim=64, num_heads=4, num_layers=4, dropout=0.0)
BARS = (("jax", "own", -0.3), ("jax", "replayed", -0.1), ("torch", "own", 0.1), ("torch", "replayed", 0.3))
FAMILY = {
    "vocab_size": 65, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}


class Answer(NamedTuple):
    """A run: output and gradient (all parameters as one vector) in fp64, and every token's experts [L, B, T, K]."""

    output: np.ndarray
    gradient: np.ndarray
    choices: np.ndarray


# (mode, choices to replay) -> answer; None where it cannot be run
Run = Callable[[str, np.ndarray | None], Answer | None]


class Subject(NamedTuple):
    """A measured module: both sides, and the name of the PyTorch side."""

    name: str
    reference: str
    jax: Run
    torch: Run


class Cell(NamedTuple):
    """Errors on its own choices and on the truth's, and the share of choices that differ from the truth's."""

    own: float  # of the output, on its own choices
    replayed: float  # on the truth's
    own_gradient: float
    replayed_gradient: float
    flipped: float  # share of tokens and layers whose set of experts differs from the truth's


def cast(make: Callable, mode: str, weights: Any = None) -> Any:
    """A module in the mode's dtypes, weights from `filled` or given; under "mixed" its contract has an fp32 router."""
    state = nnx.state(filled(lambda: make(jnp.float32)) if weights is None else weights)
    graphdef = nnx.split(nnx.eval_shape(lambda: make(DTYPE[mode])))[0]

    def convert(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        keep = mode == "mixed" and "router" in path
        return leaf.replace(leaf[...].astype(jnp.float32 if keep else DTYPE[mode]))

    copy = nnx.merge(
        graphdef, nnx.from_flat_state([(path, convert(path, leaf)) for path, leaf in nnx.to_flat_state(state)])
    )
    for _, part in nnx.iter_modules(copy):
        if isinstance(part, jax_moe.MoE):
            part.config = with_router(part.config, mode)
    return copy


def with_router(config: jax_moe.MoEConfig, mode: str) -> jax_moe.MoEConfig:
    """The contract with the router's linear map in bf16 for plain bf16, in fp32 for "mixed", unchanged otherwise."""
    dtype = {"bfloat16": "input", "mixed": "float32"}.get(mode, config.router.dtype)
    return dataclasses.replace(config, router=dataclasses.replace(config.router, dtype=dtype))


@contextmanager
def routed(replay: np.ndarray | None, batch: tuple[int, int]) -> Iterator[list[np.ndarray]]:
    """Collects every choice that `torch_ref` makes, in order; with `replay` it makes those."""
    made, right = [], torch_ref.moe.route

    def route(logits: Any, config: Any, bias: Any = None, given: Any = None) -> Any:
        own = right(logits, config, bias)
        made.append(own.expert_GSK.numpy().reshape(*batch, -1))
        if replay is None:
            return own
        return right(logits, config, bias, torch.from_numpy(replay[len(made) - 1]).reshape(own.expert_GSK.shape))

    with mock.patch.object(torch_ref.moe, "route", route):
        yield made


def wide_numpy(value: Any) -> np.ndarray:
    """An array of either framework in fp64."""
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value).astype(np.float64)


def signs(shape: tuple[int, ...]) -> np.ndarray:
    """Factors of an output before it is summed and differentiated: +1 and -1, exact in every precision."""
    return np.random.default_rng(5).choice(np.array([-1.0, 1.0], np.float32), shape)


def ours_differentiated(module: nnx.Module, run: Callable, names: Callable[[Any], dict[str, np.ndarray]]) -> tuple:
    """(output, gradient) of `run(module)`."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def objective(params: Any) -> tuple[Any, Any]:
        output = run(nnx.merge(graphdef, params, rest))
        return (output * jnp.asarray(signs(output.shape), output.dtype)).sum(), output

    (_, output), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return wide_numpy(output), one_vector(names(gradients))


def theirs_differentiated(module: torch.nn.Module, output: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(output, gradient) after a run."""
    (output * torch.from_numpy(signs(tuple(output.shape))).to(output.dtype)).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }
    return wide_numpy(output), one_vector(gradients)


def one_vector(named: dict[str, Any]) -> np.ndarray:
    """All arrays as one vector, in the order of their names."""
    return np.concatenate([wide_numpy(named[name]).reshape(-1) for name in sorted(named)])


def layer() -> Subject:
    """A Mixtral layer."""
    def make(dtype: Any) -> jax_moe.MoE:
        return jax_moe.MoE(LAYER, rngs=nnx.Rngs(0), param_dtype=dtype)

    x = np.random.default_rng(1).normal(size=(8, 64, LAYER.model_dim)).astype(np.float32)

    def ours(mode: str, replay: np.ndarray | None) -> Answer:
        made, x_BTD = cast(make, mode), jnp.asarray(x, DTYPE[mode])
        own = np.asarray(made.run(x_BTD).routing.expert_GSK).reshape(1, *x.shape[:2], -1)
        given = jnp.asarray((own if replay is None else replay)[0], jnp.int32)
        found = ours_differentiated(
            made, lambda made: made(x_BTD, expert_BTK=given)[0], partial(jax_moe.to_torch, made)
        )
        return Answer(*found, own)

    def theirs(mode: str, replay: np.ndarray | None) -> Answer:
        reference = torch_ref.MoE(with_router(LAYER, mode)).eval()
        load(reference, cast(make, mode))
        with routed(replay, x.shape[:2]) as made:
            y, _ = reference(torch.from_numpy(x).to(torch_dtype(mode)))
        return Answer(*theirs_differentiated(reference, y), np.stack(made))

    return Subject("Mixtral layer, 8 experts, 512 tokens", "torch_ref", ours, theirs)


def model() -> Subject:
    """makeMoE with four layers and a capacity that drops tokens."""
    def make(dtype: Any) -> jax_moe.MakeMoE:
        return jax_moe.MakeMoE(MODEL, rngs=nnx.Rngs(0), param_dtype=dtype)

    tokens = np.random.default_rng(2).integers(0, MODEL.vocab_size, (8, 32))

    def ours(mode: str, replay: np.ndarray | None) -> Answer:
        made = cast(make, mode)
        taps = tap_model(made, tokens)
        own = np.stack([np.asarray(taps[Place("experts", i)]) for i in range(MODEL.num_layers)])
        given = jnp.asarray(own if replay is None else replay, jnp.int32)
        found = ours_differentiated(
            made, lambda made: tap_model(made, tokens, given)[Place("logits")], partial(jax_moe.to_torch, made)
        )
        return Answer(*found, own)

    def theirs(mode: str, replay: np.ndarray | None) -> Answer:
        reference = torch_ref.MakeMoE(MODEL).eval()
        for block in reference.blocks:
            block.smoe.config = with_router(block.smoe.config, mode)
        load(reference, cast(make, mode))
        silence = torch.zeros(MODEL.num_layers, *tokens.shape, MODEL.num_experts)
        with routed(replay, tokens.shape) as made:
            logits = reference(torch.from_numpy(tokens), randomness=torch_ref.Randomness(noise_BTE=silence))
        return Answer(*theirs_differentiated(reference, logits), np.stack(made))

    return Subject("makeMoE model, 4 layers, 256 tokens", "torch_ref", ours, theirs)


def load(reference: torch.nn.Module, module: nnx.Module) -> None:
    """Loads our weights into the reference, each in its own dtype."""
    state = {name: tensor(value) for name, value in jax_moe.to_torch(module).items()}
    reference.load_state_dict(state, strict=True, assign=True)


def torch_dtype(mode: str) -> torch.dtype:
    """As `DTYPE`."""
    return {"float64": torch.float64, "float32": torch.float32}.get(mode, torch.bfloat16)


def family(folder: Path) -> Subject:
    """A Mixtral of four layers that transformers made."""
    import transformers

    from parity_tests.table.family_cases import draw_weights

    config = transformers.MixtralConfig(**FAMILY)
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    first = transformers.MixtralForCausalLM._from_config(config, **kinds)
    draw_weights(first, seed=3)
    first.save_pretrained(folder)
    tokens = np.random.default_rng(4).integers(0, 65, (8, 32))

    def ours(mode: str, replay: np.ndarray | None) -> Answer:
        loaded = jax_moe.load_pretrained(folder, dtype="float64" if mode == "float64" else "float32")
        made = cast(lambda dtype: jax_moe.Decoder(loaded.config, rngs=nnx.Rngs(0), param_dtype=dtype), mode, loaded)
        own = np.asarray(made.run(jnp.asarray(tokens)).expert_LBTK)
        given = jnp.asarray(own if replay is None else replay, jnp.int32)
        found = ours_differentiated(
            made, lambda made: made.run(jnp.asarray(tokens), expert_LBTK=given).logits_BTV,
            partial(jax_moe.to_torch, made, layout=MIXTRAL.in_memory(made.config).name),
        )
        return Answer(*found, own)

    def theirs(mode: str, replay: np.ndarray | None) -> Answer | None:
        if mode == "mixed":
            return None
        with widened() if mode == "float64" else nullcontext():
            reference = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch_dtype(mode), **kinds).eval()
            made: list[np.ndarray] = []

            def choose(gate: Any, given: Any, answer: tuple) -> tuple:
                made.append(answer[2].numpy().reshape(*tokens.shape, -1))
                if replay is None:
                    return answer
                index = torch.from_numpy(replay[len(made) - 1]).long().reshape(answer[2].shape)
                weights = torch.nn.functional.softmax(answer[0].float(), dim=-1).gather(-1, index)
                return answer[0], weights / weights.sum(dim=-1, keepdim=True), index

            for block in reference.model.layers:
                block.mlp.gate.register_forward_hook(choose)
            logits = reference(torch.from_numpy(tokens), use_cache=False).logits
            return Answer(*theirs_differentiated(reference, logits), np.stack(made))

    return Subject("Mixtral model, 4 layers, 256 tokens", f"transformers {transformers.__version__}", ours, theirs)


def measured(subject: Subject) -> dict[str, dict[str, Cell | None]]:
    """{mode: {side: cell}}."""
    with jax.enable_x64(True):
        truth = subject.torch("float64", None)
    assert truth is not None
    cells: dict[str, dict[str, Cell | None]] = {}
    for mode in MODES:
        with jax.enable_x64(mode == "float64"), jax.default_matmul_precision("highest"):
            cells[mode] = {
                name: cell(run, mode, truth) for name, run in (("jax", subject.jax), ("torch", subject.torch))
            }
    return cells


def cell(run: Run, mode: str, truth: Answer) -> Cell | None:
    """One side in one mode against the truth."""
    own, replayed = run(mode, None), run(mode, truth.choices)
    if own is None or replayed is None:
        return None
    other = (np.sort(own.choices, axis=-1) != np.sort(truth.choices, axis=-1)).any(axis=-1)
    errors = [
        error(getattr(answer, part), getattr(truth, part))
        for part in ("output", "gradient") for answer in (own, replayed)
    ]
    return Cell(*errors, float(other.mean()))


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of the truth."""
    return relative_error(actual, expected, norm)


def render(results: dict[str, tuple[Subject, dict[str, dict[str, Cell | None]]]]) -> str:
    """What is measured: the tables of the page."""
    versions = (
        ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch", "transformers"))
    )
    lines = [f"Written by `python -m parity_tests.precision`, {datetime.date.today():%Y-%m-%d}, {versions}.", ""]
    for name, (subject, cells) in results.items():
        lines += [
            f"### {name}", "",
            "| precision | side | output | output, replayed | gradient | gradient, replayed | flips |",
            "|---|---|---|---|---|---|---|",
        ]
        for mode, sides in cells.items():
            both = (("JAX", sides["jax"]), (subject.reference, sides["torch"]))
            lines += [f"| {mode} | {who} | {_cell(entry)} |" for who, entry in both]
        lines.append("")
    return "\n".join(lines)


def _cell(entry: Cell | None) -> str:
    if entry is None:
        return " | ".join("-----")
    return (
        f"{entry.own:.1e} | {entry.replayed:.1e} | {entry.own_gradient:.1e} | {entry.replayed_gradient:.1e} | "
        f"{entry.flipped:.2%}"
    )


def plot(results: dict[str, tuple[Subject, dict[str, dict[str, Cell | None]]]]) -> None:
    """A panel per subject, outputs above, gradients below; bars of both sides, pale for the truth's choices."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(results), figsize=(12, 6.4), sharex=True, sharey=True, layout="constrained")
    for row, (what, suffix) in enumerate((("output", ""), ("gradient", "_gradient"))):
        for panel, (name, (_, cells)) in zip(panels[row], results.items(), strict=True):
            for side, part, shift in BARS:
                held = [(i, sides[side]) for i, sides in enumerate(cells.values()) if sides[side] is not None]
                found = [(i, getattr(cell, part + suffix)) for i, cell in held]
                panel.bar(
                    [i + shift for i, _ in found], [max(value, 1e-17) for _, value in found], 0.18,
                    color="tab:blue" if side == "jax" else "tab:orange", alpha=1 if part == "own" else 0.45,
                    label=f"{'JAX' if side == 'jax' else 'PyTorch'}, {'own' if part == 'own' else 'replayed'} choices",
                )
            panel.set(yscale="log", ylim=(1e-17, 10))
            panel.set_xticks(range(len(MODES)), MODES)
            panel.spines[["top", "right"]].set_visible(False)
            if row == 0:
                panel.set_title(name, fontsize=10)
        panels[row][0].set_ylabel(f"{what}: error against fp64")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Measures, writes the page and the plot."""
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for subject in (layer(), model(), family(Path(folder))):
            results[subject.name] = subject, measured(subject)
            print(
                subject.name,
                *(f"  {mode}: {sides}" for mode, sides in results[subject.name][1].items()),
                sep="\n",
                flush=True,
            )
    plot(results)
    text = PAGE.read_text(encoding="utf-8")
    (head, _), (_, tail) = text.split(BEGIN), text.split(END)
    PAGE.write_text(f"{head}{BEGIN}\n{render(results)}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
