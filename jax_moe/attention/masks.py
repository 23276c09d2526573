"""Which positions a query may attend to."""

import jax.numpy as jnp

from jax_moe.dims import Array, Bool, Float, Int


def visible_positions(
    position_T: Int[Array, " T"], num_positions: int, window: int | None, mask_BU: Bool[Array, "B U"] | None
) -> Bool[Array, "b T U"]:
    """Whether T may look at U, one of `num_positions`: not ahead, not at padding, less than `window` back."""
    back_TU = position_T[:, None] - jnp.arange(num_positions)
    visible_TU = back_TU >= 0
    if window is not None:
        visible_TU = visible_TU & (back_TU < window)
    return visible_TU[None] if mask_BU is None else visible_TU & mask_BU[:, None, :]


def hidden(scores: Float[Array, "*any T U"], visible: Bool[Array, "... _ U"]) -> Float[Array, "*any T U"]:
    """Scores in which what is not visible has the most negative finite number; `visible` is broadcast to them.

    Not -inf: a row that sees nothing must not become NaN.
    """
    return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
