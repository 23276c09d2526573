"""Where the tokens of a call stand: in their texts, and among the positions that they may attend to."""

from dataclasses import dataclass

import jax.numpy as jnp

from jax_moe.attention.masks import Scope
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, wide


@dataclass(frozen=True)
class Positions:
    """T tokens among U slots: a whole call has slots 0 to T - 1, a step of generation one token at some slot of a
    cache.
    """

    position_BT: Int[Array, "B T"]  # counted from each text's first token
    slot_T: Int[Array, " T"]
    num_slots: int  # U
    mask_BU: Bool[Array, "B U"] | None  # False at padding; None: there is none
    text_length: Int[Array, ""] | None = None  # of the longest text so far, at most num_slots; None: T

    @property
    def whole(self) -> bool:
        """Whether these tokens are all that there is to attend to."""
        return self.num_slots == self.slot_T.shape[0]

    @property
    def mask_BT(self) -> Bool[Array, "B T"] | None:
        """False where one of these tokens is padding. A step has none."""
        return self.mask_BU if self.whole else None

    def scope(self, window: int | None, chunk: int | None = None) -> Scope:
        """What T may look at: not ahead, not at padding, less than `window` back, in the same `chunk`."""
        return Scope(self.slot_T, self.num_slots, self.mask_BU, window, chunk)


def whole_call(
    num_positions: int, position_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None
) -> Positions:
    """The positions of a call without a cache."""
    return Positions(position_BT, jnp.arange(num_positions), num_positions, mask_BT)


def growth(
    position_BT: Int[Array, "B T"], rate: float, step: int, dtype: DTypeLike
) -> Float[Array, "B T"]:
    """The factor of queries that grow with their position, 1 + rate * ln(1 + floor(position / step)), in fp32 or wider
    (scalable softmax, arXiv 2501.19399, as Llama 4 and Mistral 4 have it).
    """
    return 1 + rate * jnp.log1p(jnp.floor(position_BT.astype(wide(dtype)) / step))
