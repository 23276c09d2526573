"""The reference for a Hugging Face folder: `transformers`, with every intermediate value recorded by hooks.

Only config.json and the weights of the folder are used, never its code.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.config.decoder import LayerConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.guarded import parse_json, read_object
from jax_moe.porting.families import family_named
from jax_moe.porting.families.family import Family
from jax_moe.porting.formats.hf_folder import open_folder
from jax_moe.porting.torch_tensors import import_torch, numpy_to_tensor
from moe_parity.sides.hooks import Watch, first, watching
from moe_parity.sides.jax_moe import ranked_scores
from moe_parity.stages import Place


def import_transformers() -> Any:
    """The package transformers. Raises ValueError that says how to install it."""
    import_torch("parity")
    try:
        return importlib.import_module("transformers")
    except ImportError:
        hint = "pip install 'jax-moe[hf]'"
        needs = "parity of a Hugging Face folder needs transformers, which is not installed"
        raise ValueError(f"{needs}: {hint}") from None


@contextmanager
def widened() -> Iterator[None]:
    """transformers in fp64 throughout: inside, every float32 that its code names becomes float64.

    transformers upcasts to float32 by name where we upcast to float32 or wider. The counts of its balance loss stay in
    float32, which holds them exactly.
    """
    torch = import_torch("parity")
    from torch.overrides import TorchFunctionMode

    def wider(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Widened(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func is torch.Tensor.float:
                return args[0].double()
            return func(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widened():
            yield
    finally:
        torch.set_default_dtype(before)


def load_reference(path: Path, model_type: str, dtype: str) -> Any:
    """The transformers model of a folder, with eager attention and without dropout.

    Of a quantised folder it gets the dequantised weights: transformers' own reading needs further packages.
    """
    transformers, torch = import_transformers(), import_torch("parity")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, family_named(model_type).whole.architecture)
    source: dict[str, Any] = {"pretrained_model_name_or_path": path, "output_router_logits": True}
    found = open_folder(path)
    if found.quantised is not None and found.origin is not None:
        state = {name: numpy_to_tensor(header.read()) for name, header in found.stored.items()}
        values = parse_json(found.origin.config_json, path)
        source = {"pretrained_model_name_or_path": None, "state_dict": state}
        source["config"] = kind.config_class(**{**values, "output_router_logits": True})
    return kind.from_pretrained(
        **source, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager",
        local_files_only=True,
    ).eval()


def trace_transformers(
    path: Path, model_type: str, tokens_BT: np.ndarray, dtype: str, grads: bool
) -> dict[Place, np.ndarray]:
    """Runs the model: every stage, the loss (balance loss included) and, with `grads`, every gradient."""
    torch, family = import_torch("parity"), family_named(model_type)
    assert family.mixture is not None
    untrained = tuple(row.theirs for row in family.mixture.in_memory.rows if row.ours == "router.correction_bias")
    config = family.config(read_object(path / "config.json"))
    inputs = torch.from_numpy(np.asarray(tokens_BT, np.int64))
    with widened() if dtype == "float64" else nullcontext(), watching() as watch:
        reference = load_reference(path, model_type, dtype)
        first_layer = reference.get_submodule(family.whole.layer.format(l=0)[:-1])
        watch.into(first_layer, lambda x: watch.put(Place("embedding"), x))
        for i, layer in enumerate(config.layers):
            _watch_layer(watch, reference, family, layer, i, tokens_BT.shape)
        final_norm = reference.get_submodule(_holder(family.whole.named("final_norm.scale")))
        watch.out_of(final_norm, lambda y, *_: watch.put(Place("final_norm"), y))
        with torch.set_grad_enabled(grads):
            output = reference(inputs, labels=inputs, use_cache=False)
        watch.put(Place("logits"), output.logits)
        if getattr(output, "aux_loss", None) is not None:
            watch.put(Place("balance_loss"), output.aux_loss)
        watch.put(Place("loss"), output.loss)
        if grads:
            output.loss.backward()
            for name, value in reference.named_parameters():
                grad = torch.zeros_like(value) if value.grad is None else value.grad
                if not name.endswith(untrained):
                    watch.trace[Place("gradient", None, name)] = grad.numpy()
    return watch.trace


def _holder(name: str) -> str:
    """The path of the module that holds a parameter."""
    return name.rpartition(".")[0]


def _watch_layer(
    watch: Watch, reference: Any, family: Family, contract: LayerConfig, i: int, shape: tuple[int, ...]
) -> None:
    """Sets hooks on the modules of a layer, found by the names that the family's rows give their weights."""
    assert family.mixture is not None
    whole, mixture = family.whole, family.mixture.in_memory
    stages = {f"{kind}.scale": kind for kind in ("attention_norm", "ffn_norm")}
    paths = {stages[row.ours]: _holder(row.theirs) for row in whole.norms if row.ours in stages}
    paths["attention"] = _holder(_holder(whole.attention[contract.attention.kind][0].theirs))
    sparse = contract.ffn.kind == "moe"
    paths = {kind: f"{whole.layer}{path}" for kind, path in paths.items()} | {"residual": whole.layer[:-1]}
    paths["combined"] = mixture.within[:-1] if sparse else f"{whole.layer}{_holder(_holder(whole.dense[0].theirs))}"
    modules = {kind: reference.get_submodule(path.format(l=i)) for kind, path in paths.items()}
    own = dict(modules)
    if sparse and mixture.within == whole.layer:  # the layer itself adds a shared expert: no module has the sum
        del own["combined"]
    for kind, module in own.items():
        watch.out_of(module, lambda answer, *_, kind=kind: watch.put(Place(kind, i), first(answer), (*shape, -1)))
    if sparse:
        assert isinstance(contract.ffn, MoEConfig)
        names = {row.ours: row.theirs for row in mixture.rows}
        _watch_mixture(watch, modules["combined"], names, contract.ffn, i, shape)


def _watch_mixture(
    watch: Watch, mixture: Any, names: Mapping[str, str], config: MoEConfig, i: int, shape: tuple[int, ...]
) -> None:
    """Sets hooks on the router, the experts and, behind their gate, the shared experts; `names` of our parameters."""
    torch, experts = import_torch("parity"), mixture.get_submodule(_holder(names["experts.down"]))

    def answered(answer: Any, x: Any, index: Any, weights: Any) -> None:
        if config.router.correction_bias:  # beside it transformers leaves the choices in any order
            bias = mixture.state_dict()[names["router.correction_bias"]].numpy().reshape(-1)
            logits = watch.trace[Place("router_logits", i)].reshape(len(index), -1)
            scores = torch.from_numpy(ranked_scores(logits, config, bias)).gather(1, index)
            best_first = scores.sort(descending=True, stable=True).indices
            index, weights = index.gather(1, best_first), weights.gather(1, best_first)
        for kind, value in (("weights", weights), ("experts", index)):
            watch.put(Place(kind, i), value, (*shape, -1))
        with torch.no_grad():  # the experts' own code, on each choice alone, with weight 1
            unit = torch.ones_like(weights[:, :1])
            alone = [experts.forward(x, index_R1, unit) for index_R1 in index.split(1, dim=1)]
        watch.put(Place("expert_outputs", i), torch.stack(alone, dim=1), (*shape, index.shape[1], -1))

    def scored(answer: Any, x: Any, *_: Any) -> None:
        scores, logits = answer  # Llama 4: scores of all experts, 0 of those that were not chosen
        index = logits.topk(config.top_k, dim=-1).indices
        for kind, value in (("router_logits", logits), ("weights", scores.gather(1, index)), ("experts", index)):
            watch.put(Place(kind, i), value, (*shape, -1))
        with torch.no_grad():  # every expert on every token, which its score multiplies
            weighted = (x * scores.T[..., None]).flatten(0, 1)
            each = experts.forward(weighted).unflatten(0, (config.num_experts, -1))
        alone = [each[index_R, torch.arange(len(index))] for index_R in index.T]
        watch.put(Place("expert_outputs", i), torch.stack(alone, dim=1), (*shape, config.top_k, -1))

    router = mixture.get_submodule(_holder(names["router.kernel"]))
    if config.expert.weight_on == "input":
        watch.out_of(router, scored)
    else:
        watch.out_of(router, lambda answer, *_: watch.put(Place("router_logits", i), first(answer), (*shape, -1)))
        watch.out_of(experts, answered)
    if config.expert.shared_gate:
        found: dict[str, Any] = {}
        shared = mixture.get_submodule(_holder(_holder(names["shared.down"])))
        watch.out_of(shared, lambda y, *_: found.update(y=y))

        def gated(gate: Any, *_: Any) -> None:
            watch.put(Place("shared", i), gate.sigmoid() * found["y"], (*shape, -1))

        watch.out_of(mixture.get_submodule(_holder(names["shared_gate"])), gated)
