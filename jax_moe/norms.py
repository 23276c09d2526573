"""Layer norm with PyTorch's epsilon, and RMS norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.config.decoder import NormKind
from jax_moe.config.moe import MixtureNorm
from jax_moe.dims import Array, DTypeLike, Float, wide
from jax_moe.parameters import declare, parameter

LAYER_NORM_EPS = 1e-5  # torch's default; flax's is 1e-6


def layer_norm(
    width: int, rngs: nnx.Rngs, param_dtype: DTypeLike, eps: float = LAYER_NORM_EPS, dim: str = "D"
) -> nnx.LayerNorm:
    """flax's LayerNorm with torch's epsilon and the two-pass variance (the fast variance loses digits)."""
    norm = nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, param_dtype=param_dtype, rngs=rngs)
    return declare(norm, "norm", scale=dim, bias=dim)


def rms_norm(
    x: Float[Array, "*any D"], scale_D: Float[Array, "*some D"] | None, eps: float, wide_scale: bool = False
) -> Float[Array, "*any D"]:
    """x / rms(x) in fp32 or wider, times the scale (arXiv 1910.07467, eq. 4); rounded to the input's dtype before the
    scale or, `wide_scale`, after it. None: there is no scale.
    """
    wide_x = x.astype(wide(x.dtype))
    normed = wide_x * jax.lax.rsqrt((wide_x**2).mean(axis=-1, keepdims=True) + eps)
    if scale_D is None:
        return normed.astype(x.dtype)
    if wide_scale:
        return (normed * scale_D.astype(normed.dtype)).astype(x.dtype)
    return normed.astype(x.dtype) * scale_D.astype(x.dtype)


def mixture_norm(
    kind: MixtureNorm, x: Float[Array, "*any D"], scale_D: Float[Array, "*some D"], eps: float
) -> Float[Array, "*any D"]:
    """A norm of that kind, in fp32 or wider; `rms_of_scaled` rounds the scaled input to its dtype on the way."""
    if kind in ("rms", "rms_wide"):
        return rms_norm(x, scale_D, eps, kind == "rms_wide")
    wide_x, centred_D = x.astype(wide(x.dtype)), 1 + scale_D.astype(wide(x.dtype))
    if kind == "rms_of_scaled":
        wide_x = (wide_x * centred_D).astype(x.dtype).astype(wide_x.dtype)
    mean_square = (wide_x**2).mean(axis=-1, keepdims=True)
    normed = wide_x * jax.lax.rsqrt(mean_square + eps)
    return (normed * centred_D if kind == "rms_centered" else normed).astype(x.dtype)


class MixtureScale(nnx.Module):
    """The learned scale of `mixture_norm`: 1, or 0 where 1 is added to it."""

    def __init__(self, kind: MixtureNorm, width: int, eps: float, param_dtype: DTypeLike = jnp.float32):
        self.kind, self.eps = kind, eps
        self.scale = parameter(jnp.full((width,), float(kind in ("rms", "rms_wide")), param_dtype), "D", "norm")

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        """The normed input, in its dtype."""
        return mixture_norm(self.kind, x, self.scale[...], self.eps)


def make_norm(
    kind: NormKind, width: int, eps: float, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> "RMSNorm | nnx.LayerNorm":
    """The norm of that kind over D; a layer norm has a bias."""
    if kind == "layer":
        return layer_norm(width, rngs, param_dtype, eps)
    return RMSNorm(width, eps, param_dtype, kind=kind)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale; "rms_centered": stored less 1, and applied before rounding (Qwen3-Next)."""

    def __init__(
        self, width: int, eps: float, param_dtype: DTypeLike = jnp.float32, dim: str = "D", kind: NormKind = "rms"
    ):
        self.eps, self.kind = eps, kind
        self.scale = parameter(jnp.full((width,), float(kind != "rms_centered"), param_dtype), dim, "norm")

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        """The normed input, in its dtype."""
        scale_D = self.scale[...]
        if self.kind == "rms_centered":
            scale_D = 1 + scale_D.astype(wide(x.dtype))
        return rms_norm(x, scale_D, self.eps, self.kind != "rms")
