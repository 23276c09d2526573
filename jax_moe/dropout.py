"""Dropout by a given mask or by a drawn mask."""

import jax
import jax.numpy as jnp

from jax_moe.dims import Array, Bool, Float, Int, PRNGKeyArray


def fold(key: PRNGKeyArray | None, number: int | Int[Array, ""]) -> PRNGKeyArray | None:
    """A separate key for each numbered use; None stays None."""
    return None if key is None else jax.random.fold_in(key, number)


def draw_keep(key: PRNGKeyArray, rate: float, shape: tuple[int, ...]) -> Bool[Array, "*any"]:
    """True with probability 1 - rate, to 16 bits: a rate of 0.1 is 6554 / 65536.

    A random 32-bit word serves two neighbours in the last dim: drawing masks is a large part of a small model's step.
    """
    *rest, last = shape
    words = jax.random.bits(key, (*rest, (last + 1) // 2), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*rest, last + last % 2)[..., :last]
    return halves >= jnp.uint16(min(round(rate * 65536), 65535))


def apply_keep(x: Float[Array, "*any"], keep: Bool[Array, "*any"], rate: float) -> Float[Array, "*any"]:
    """Kept entries divided by 1 - rate, the others 0."""
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def dropout(
    x: Float[Array, "*any"], rate: float, key: PRNGKeyArray | None, keep: Bool[Array, "*any"] | None = None
) -> Float[Array, "*any"]:
    """Dropout by the given mask, else by a mask drawn from the key, else none."""
    if rate == 0:
        return x
    if keep is None and key is not None:
        keep = draw_keep(key, rate, x.shape)
    return x if keep is None else apply_keep(x, keep, rate)
