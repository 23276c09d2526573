"""The reference for a Hugging Face folder: `transformers`, with every intermediate value recorded by hooks.

Only config.json and the weights of the folder are used, never its code.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.porting.families import architecture_of
from jax_moe.porting.torch_tensors import import_torch
from moe_parity.sides.hooks import Watch, first, watching
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


def trace_transformers(
    path: Path, model_type: str, tokens_BT: np.ndarray, dtype: str, grads: bool
) -> dict[Place, np.ndarray]:
    """Runs the model: every stage, the loss (balance loss included) and, with `grads`, every gradient."""
    transformers, torch = import_transformers(), import_torch("parity")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, architecture_of(model_type))
    inputs = torch.from_numpy(np.asarray(tokens_BT, np.int64))
    with widened() if dtype == "float64" else nullcontext(), watching() as watch:
        reference = kind.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager",
            local_files_only=True, output_router_logits=True,
        ).eval()
        watch_decoder(watch, reference, tokens_BT.shape)
        with torch.set_grad_enabled(grads):
            output = reference(inputs, labels=inputs, use_cache=False)
        watch.put(Place("logits"), output.logits)
        watch.put(Place("balance_loss"), output.aux_loss)
        watch.put(Place("loss"), output.loss)
        if grads:
            output.loss.backward()
            for name, value in reference.named_parameters():
                grad = torch.zeros_like(value) if value.grad is None else value.grad
                watch.trace[Place("gradient", None, name)] = grad.numpy()
    return watch.trace


def watch_decoder(watch: Watch, reference: Any, shape: tuple[int, ...]) -> None:
    """Sets hooks on a causal language model's embedding, norms, attention, routers, experts and layers."""
    decoder = reference.model
    watch.into(decoder.layers[0], lambda x: watch.put(Place("embedding"), x))
    for i, layer in enumerate(decoder.layers):
        _watch_layer(watch, layer, i, shape)
    watch.out_of(decoder.norm, lambda y, *_: watch.put(Place("final_norm"), y))


def _watch_layer(watch: Watch, layer: Any, i: int, shape: tuple[int, ...]) -> None:
    def keep(kind: str, module: Any) -> None:
        watch.out_of(module, lambda answer, *_: watch.put(Place(kind, i), first(answer)))

    keep("attention_norm", layer.input_layernorm)
    keep("attention", layer.self_attn)
    keep("ffn_norm", layer.post_attention_layernorm)
    ffn = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
    if hasattr(ffn, "experts"):
        _watch_mixture(watch, ffn, i, shape)
    keep("combined", ffn)
    keep("residual", layer)


def _watch_mixture(watch: Watch, mixture: Any, i: int, shape: tuple[int, ...]) -> None:
    def routed(answer: tuple, *_: Any) -> None:
        for kind, value in zip(("router_logits", "weights", "experts"), answer, strict=True):
            watch.put(Place(kind, i), value, (*shape, -1))

    def answered(answer: Any, x: Any, index: Any, weights: Any) -> None:
        torch = import_torch("parity")
        with torch.no_grad():  # the experts' own code, on each choice alone, with weight 1
            unit = torch.ones_like(weights[:, :1])
            alone = [mixture.experts.forward(x, index_R1, unit) for index_R1 in index.split(1, dim=1)]
        watch.put(Place("expert_outputs", i), torch.stack(alone, dim=1), (*shape, index.shape[1], -1))

    watch.out_of(mixture.gate if hasattr(mixture, "gate") else mixture.router, routed)
    watch.out_of(mixture.experts, answered)
    if hasattr(mixture, "shared_expert"):
        found: dict[str, Any] = {}
        watch.out_of(mixture.shared_expert, lambda y, *_: found.update(y=y))

        def gated(gate: Any, *_: Any) -> None:
            watch.put(Place("shared", i), gate.sigmoid() * found["y"], (*shape, -1))

        watch.out_of(mixture.shared_expert_gate, gated)
