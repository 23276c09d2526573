"""Mixed precision: weights are cast for a single call; stored weights and their gradients keep their dtype."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from jax_moe.config.parameters import Role
from jax_moe.config.precision import Precision
from torch_ref.dims import Tensor


def torch_dtype(name: str) -> torch.dtype:
    """torch.bfloat16 for "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def cast_to_compute(model: nn.Module, precision: Precision) -> dict[str, Tensor]:
    """The parameters for a call, by name; gradients flow back to the stored parameters, in their dtype.

    Each is cast as `Precision.dtype_of` says of its role. Not cast are routers, Soft MoE's phi and, unless
    `cast_experts` is "at_once", experts. Norms become `norms`, all else `compute`.
    """
    cast = {}
    for name, value in model.named_parameters():
        dtype = precision.dtype_of(role_of(model, name))
        cast[name] = value if dtype is None else value.to(torch_dtype(dtype))
    return cast


def role_of(model: nn.Module, name: str) -> Role | None:
    """The role of a parameter, as the innermost module around it says in its `roles`; that of a norm is `norm`."""
    role, module = None, model
    for part in name.split("."):
        role = getattr(module, "roles", {}).get(part, role)
        module = getattr(module, part)
        role = "norm" if isinstance(module, nn.LayerNorm) else role
    return role


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
