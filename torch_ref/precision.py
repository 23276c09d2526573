"""Mixed precision: weights are cast for a single call; stored weights and their gradients keep their dtype."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from jax_moe.config.precision import Precision
from torch_ref.dims import Tensor

# Names of expert parameters in torch_ref and in the original projects.
EXPERT_WEIGHTS = frozenset(("up", "gate", "down", "net", "w1", "w2", "w3"))


def torch_dtype(name: str) -> torch.dtype:
    """torch.bfloat16 for "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def cast_to_compute(model: nn.Module, precision: Precision) -> dict[str, Tensor]:
    """The parameters for a call, by name; gradients flow back to the stored parameters, in their dtype.

    As they are: routers, Soft MoE's phi, and unless cast at once the experts, which cast where they meet the tokens.
    Norms become `norms`, all else `compute`.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    cast = {}
    for name, value in model.named_parameters():
        owner = name.rpartition(".")[0]
        dtype = precision.norms if owner in norms else dtype_of(name, precision)
        cast[name] = value if dtype is None else value.to(torch_dtype(dtype))
    return cast


def dtype_of(path: str, precision: Precision) -> str | None:
    """The dtype to which the weight at a dotted path is cast, norms excluded; None: it stays as it is."""
    parts = path.split(".")
    inside_expert = bool({"experts", "shared"}.intersection(parts))
    if "router" in parts or "phi" in parts or ("gate" in parts and not inside_expert):  # Mixtral's router is named gate
        return None
    if precision.cast_experts == "at_use" and inside_expert and EXPERT_WEIGHTS.intersection(parts):
        return None
    return str(precision.compute)


class _Method(nn.Module):
    """A module whose forward is a method of another module, for `functional_call`."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)


def call_in(precision: Precision, model: nn.Module, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
    """`model.method(*args, **kwargs)` with the weights of `cast_to_compute`; the caller casts inputs and logits."""
    weights = {f"model.{name}": value for name, value in cast_to_compute(model, precision).items()}
    return functional_call(_Method(model, method), weights, args, kwargs)
