"""The largest entries of a row, ties to the lower index."""

import jax
import jax.numpy as jnp

from jax_moe.dims import Array, Float, Int

LARGEST_COUNT = 8  # up to here, repeated maxima are faster on CPU than top_k (8192 x 128: 6.7 ms against 9.8 ms)


def best_first(score: Float[Array, "*any X"], count: int) -> Int[Array, "*any Y"]:
    """Indices of the `count` highest scores, best first; on equal scores the lower index wins. -0 is +0, NaN is inf."""
    score = jnp.where(jnp.isnan(score), jnp.inf, jnp.where(score == 0, jnp.zeros_like(score), score))
    if count > LARGEST_COUNT:
        return jax.lax.top_k(score, count)[1]
    # integers in the order of the floats; the lowest integer, which is no float, marks a taken entry
    integer = jnp.dtype(f"int{8 * score.dtype.itemsize}")
    bits, largest = jax.lax.bitcast_convert_type(score, integer), jnp.iinfo(integer).max
    key = jnp.where(bits < 0, bits ^ largest, bits)
    index, found = jax.lax.broadcasted_iota(jnp.int32, score.shape, score.ndim - 1), []
    for _ in range(count):
        is_best = key == key.max(axis=-1, keepdims=True)
        found.append(jnp.where(is_best, index, score.shape[-1]).min(axis=-1))
        key = jnp.where(index == found[-1][..., None], jnp.iinfo(integer).min, key)
    return jnp.stack(found, axis=-1)
