"""Activation functions by name, and the clamp of gpt-oss."""

import jax
import jax.numpy as jnp

from jax_moe.config.moe import Activation
from jax_moe.dims import Array, Float


def activate(name: Activation, x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Activations by name; `gelu` is exact (torch's default), `quick_gelu` x * sigmoid(1.702 x), `relu2` relu(x)^2."""
    if name == "relu":
        return jax.nn.relu(x)
    if name == "relu2":
        return jnp.square(jax.nn.relu(x))
    if name == "silu":
        return jax.nn.silu(x)
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return x


def soft_cap(x: Float[Array, "*any"], bound: float) -> Float[Array, "*any"]:
    """bound * tanh(x / bound): x near 0, and never beyond the bound."""
    return bound * jnp.tanh(x / bound)


def clamp_above(x: Float[Array, "*any"], bound: float) -> Float[Array, "*any"]:
    """min(x, bound) with torch.clamp's gradient: 1 up to and at the bound (jnp.clip splits it there)."""
    return jnp.where(x > bound, jnp.full_like(x, bound), x)
