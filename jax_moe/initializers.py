"""Initial weights: drawn in fp32 or wider, and rounded once to the dtype of the parameter.

A draw in bf16 has few distinct values: its tails are cut, and means and variances are off.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.dims import Array, DTypeLike, PRNGKeyArray, wide


def rounded(init: nnx.Initializer) -> nnx.Initializer:
    """The initializer, drawn in fp32 or wider whatever dtype it is asked for."""

    def draw(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return init(key, shape, wide(dtype)).astype(dtype)

    return draw


def uniform(bound: float) -> nnx.Initializer:
    """U(-bound, bound)."""
    return rounded(lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound))
