"""Activation functions by name."""

import torch
from torch.nn import functional as F

from jax_moe.config import Activation
from torch_ref.dims import Float, Tensor


def activate(name: Activation, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Activations by name; `gelu` is exact (torch's default), `quick_gelu` x * sigmoid(1.702 x), `relu2` relu(x)^2."""
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return x
