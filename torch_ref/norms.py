"""Layer norm computed in fp32 or wider, in the dtype of its input."""

from torch import nn
from torch.nn import functional as F

from torch_ref.dims import Float, Tensor, wide


def normed(x: Float[Tensor, "*any D"], norm: nn.LayerNorm) -> Float[Tensor, "*any D"]:
    """The layer norm, computed in fp32 or wider and returned in the input's dtype."""
    compute = wide(x.dtype)
    weight, bias = norm.weight.to(compute), norm.bias.to(compute)
    return F.layer_norm(x.to(compute), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)
