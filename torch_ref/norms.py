"""Norms computed in fp32 or wider, in the dtype of their input."""

import torch
from torch import nn
from torch.nn import functional as F

from jax_moe.config import MixtureNorm
from torch_ref.dims import Float, Tensor, wide


def normed(x: Float[Tensor, "*any D"], norm: nn.LayerNorm) -> Float[Tensor, "*any D"]:
    """The layer norm, computed in fp32 or wider and returned in the input's dtype."""
    compute = wide(x.dtype)
    weight, bias = norm.weight.to(compute), norm.bias.to(compute)
    return F.layer_norm(x.to(compute), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


class MixtureScale(nn.Module):
    """A norm inside a mixture: x / rms(x) * w, rounded before w or (`rms_wide`) after it, or with 1 + w
    (`rms_centered`), or x (1 + w) over its own rms.
    """

    def __init__(self, kind: MixtureNorm, width: int, eps: float):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width) if kind in ("rms", "rms_wide") else torch.zeros(width))

    def forward(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        """The normed input, in its dtype."""
        wide_x, weight = x.to(wide(x.dtype)), self.weight.to(wide(x.dtype))
        if self.kind == "rms_of_scaled":
            wide_x = (wide_x * (1 + weight)).to(x.dtype).to(wide_x.dtype)
        normed = wide_x / (wide_x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        if self.kind == "rms_wide":
            return (normed * weight).to(x.dtype)
        if self.kind == "rms":
            return normed.to(x.dtype) * self.weight.to(x.dtype)
        return (normed * (1 + weight) if self.kind == "rms_centered" else normed).to(x.dtype)
