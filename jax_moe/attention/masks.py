"""Which positions a query may attend to."""

from typing import NamedTuple

import jax.numpy as jnp

from jax_moe.dims import Array, Bool, Float, Int


class Scope(NamedTuple):
    """What T queries may attend to among U keys, as a rule: an array of it [B, T, U] is made by `visible` alone."""

    slot_T: Int[Array, " T"]
    num_slots: int  # U
    mask_BU: Bool[Array, "B U"] | None = None  # False at padding
    window: int | None = None
    chunk: int | None = None
    causal: bool = True

    @property
    def whole(self) -> bool:
        """Whether query and key number i stand at the same position."""
        return self.num_slots == self.slot_T.shape[0]

    def visible(self) -> Bool[Array, "b T U"]:
        """Whether T may look at U, as `visible_positions` has it."""
        return visible_positions(self.slot_T, self.num_slots, self.window, self.mask_BU, self.chunk, self.causal)


def visible_positions(
    position_T: Int[Array, " T"], num_positions: int, window: int | None, mask_BU: Bool[Array, "B U"] | None,
    chunk: int | None = None, causal: bool = True,
) -> Bool[Array, "b T U"]:
    """Whether T may look at U, one of `num_positions`: not ahead where it is causal, not at padding, less than `window`
    back, in the same chunk of `chunk` positions. Chunks are counted from a text's first position that is no padding.
    """
    back_TU = position_T[:, None] - jnp.arange(num_positions)
    visible_TU = back_TU >= 0 if causal else jnp.ones(back_TU.shape, bool)
    if window is not None:
        visible_TU = visible_TU & (back_TU < window)
    visible_BTU = visible_TU[None] if mask_BU is None else visible_TU & mask_BU[:, None, :]
    if chunk is None:
        return visible_BTU
    first_B = jnp.zeros(1, jnp.int32) if mask_BU is None else jnp.argmax(mask_BU, axis=1)
    both = (position_T, jnp.arange(num_positions))
    chunk_BT, chunk_BU = ((position - first_B[:, None]) // chunk for position in both)
    return visible_BTU & (chunk_BT[:, :, None] == chunk_BU[:, None])


def hidden(scores: Float[Array, "*any T U"], visible: Bool[Array, "... _ U"]) -> Float[Array, "*any T U"]:
    """Scores in which what is not visible has the most negative finite number; `visible` is broadcast to them.

    Not -inf: a row that sees nothing must not become NaN.
    """
    return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
