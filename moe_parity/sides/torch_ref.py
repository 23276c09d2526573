"""The reference for makeMoE models and single layers: `torch_ref`, which hands out every stage when asked.

Noise and dropout are off on both sides. torch and torch_ref are imported when a run starts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import MoEConfig, SoftMoEConfig
from jax_moe.porting.torch_tensors import import_torch, numpy_to_tensor
from moe_parity.batch import beside
from moe_parity.stages import KINDS, Place, places


def trace_torch_ref(
    config: Any, weights: dict[str, np.ndarray], x: np.ndarray, cotangent: np.ndarray | None, grads: bool
) -> dict[Place, np.ndarray]:
    """Runs `torch_ref` with these weights, loaded with strict=True: every stage and, with `grads`, every gradient.

    `x` holds the tokens of a language model, whose loss is that of the next token, or the inputs of a layer, whose loss
    is sum(answer * cotangent).
    """
    torch = import_torch("parity")
    name, run = _KINDS[type(config)]
    module = make_module(name, config, weights)
    with torch.set_grad_enabled(grads):
        objective, found = run(module, torch.from_numpy(np.asarray(x)), cotangent)
    trace = {place: value.detach().numpy().copy() for place, value in found.items()}
    if grads and objective is not None:
        objective.backward()
        for name, value in module.named_parameters():
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            trace[Place("gradient", None, name)] = grad.numpy()
    return trace


def make_module(name: str, config: Any, weights: Mapping[str, np.ndarray]) -> Any:
    """The `torch_ref` module of that name, in evaluation mode and in the weights' dtype."""
    import torch_ref

    tensors = {key: numpy_to_tensor(value) for key, value in weights.items()}
    module = getattr(torch_ref, name)(config).to(next(iter(tensors.values())).dtype).eval()
    module.load_state_dict(tensors, strict=True)
    return module


def _run_model(model: Any, tokens_BT: Any, _cotangent: Any) -> tuple[Any, dict[Place, Any]]:
    """The loss of a makeMoE model, and its values by place."""
    import torch_ref

    config = model.config
    silence = import_torch("parity").zeros(config.num_layers, *tokens_BT.shape, config.num_experts)
    output = model.run(tokens_BT, randomness=torch_ref.Randomness(noise_BTE=silence), watch=True)
    loss = torch_ref.next_token_loss(output.logits_BTV[:, :-1], tokens_BT[:, 1:])
    stages = {**output.stages, "logits": output.logits_BTV}
    return loss, {**places(stages, config.num_layers, config.moe_layers), Place("loss"): loss}


def _run_layer(layer: Any, x_BTD: Any, cotangent: np.ndarray | None, **arrays: Any) -> tuple[Any, dict[Place, Any]]:
    """The loss of a layer, None without a cotangent, and its values by place."""
    output = layer.run(x_BTD, watch=True, **arrays)
    loss = None if cotangent is None else (output.y_BTD * import_torch("parity").from_numpy(cotangent)).sum()
    return loss, {Place(kind): output.stages[kind] for kind in sorted(output.stages, key=KINDS.index)}


def _run_moe(layer: Any, x_BTD: Any, cotangent: np.ndarray | None) -> tuple[Any, dict[Place, Any]]:
    """As `_run_layer`, its learned noise silenced, with what the layer reads beside its vectors."""
    config, torch = layer.config, import_torch("parity")
    drawn = {name: torch.from_numpy(value) for name, value in beside(config, x_BTD.shape).items()}
    arrays = {name: v.to(x_BTD.dtype) if v.is_floating_point() else v.long() for name, v in drawn.items()}
    if config.router.noise == "learned_gaussian":
        arrays["noise_BTE"] = torch.zeros(*x_BTD.shape[:2], config.num_experts)
    return _run_layer(layer, x_BTD, cotangent, **arrays)


# For each kind of contract: the module of torch_ref, and how it is run.
_KINDS: dict[type, tuple[str, Callable[..., Any]]] = {
    MakeMoEConfig: ("MakeMoE", _run_model), SoftMoEConfig: ("SoftMoE", _run_layer), MoEConfig: ("MoE", _run_moe),
}
