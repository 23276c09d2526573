"""Rows sorted by expert and cut into tiles: each tile is one expert's, and has one of a few sizes.

The first tile of an expert takes its remainder, in the smallest size that holds it; full tiles follow. So the work is that
of the choices plus less than one step an expert, whatever E is and however the experts are loaded.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_moe.dims import Array, Int
from jax_moe.dispatch import Slots
from jax_moe.routing import Routing


class Tiles(NamedTuple):
    """The tiles in the order of their sizes, full ones last, and whose rows they hold."""

    expert_I: Int[Array, " I"]  # whose tile it is
    row_I: Int[Array, " I"]  # its first row
    bound_N: Int[Array, " N"]  # the first tile of each size, of the full ones, and the number of tiles
    choice_P: Int[Array, " P"]  # the choice s * K + k in each row; S * K in a spare one


def tile_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Multiples of an eighth of an expert's fair share, a power of two from 8 to 64; fewer where there is little to do.

    Smaller steps waste less on padding, larger tiles read the weights less often, each size is a loop to compile.
    """
    share = max(num_rows // num_experts, 1)
    step = min(max(1 << (share // 8).bit_length() - 1, 8), 64) if share >= 8 else 8
    if num_rows < 2048:
        return tuple(step * many for many in (1, 2, 4, 8) if step * many < 2 * num_rows) or (step,)
    return tuple(step * many for many in range(1, 13))


def num_places(num_rows: int, num_experts: int, sizes: tuple[int, ...]) -> int:
    """Rows of a buffer that holds every tile."""
    widest = max(np.diff((0, *sizes)))
    return num_rows + num_experts * int(widest)


def plan_tiles(routing: Routing, slots: Slots, capacity: int, num_experts: int, sizes: tuple[int, ...]) -> Tiles:
    """Places of all choices that own a slot; an expert without any has one empty tile of the smallest size."""
    G, S, K = slots.slot_GSK.shape
    expert_GR, slot_GR = routing.expert_GSK.reshape(G, -1), slots.slot_GSK.reshape(G, -1)
    kept_GR = slot_GR < capacity
    group_GR = jnp.broadcast_to(jnp.arange(G)[:, None], expert_GR.shape)
    count_GE = jnp.zeros((G, num_experts), jnp.int32).at[group_GR, expert_GR].add(kept_GR.astype(jnp.int32))
    count_E, before_GE = count_GE.sum(axis=0), jnp.cumsum(count_GE, axis=0) - count_GE
    largest, step_N = sizes[-1], jnp.asarray(sizes, jnp.int32)
    tiles_E = jnp.maximum(-(-count_E // largest), 1)
    rest_E = count_E - (tiles_E - 1) * largest
    size_E = jnp.searchsorted(step_N, rest_E).astype(jnp.int32)
    spare_E = step_N[size_E] - rest_E
    rows_E = count_E + spare_E
    first_E = jnp.cumsum(rows_E) - rows_E
    rank_GR = slot_GR + jnp.take_along_axis(before_GE, expert_GR, axis=1)
    # the remainder's tile comes first and holds the spare rows
    row_GR = first_E[expert_GR] + rank_GR + jnp.where(rank_GR < rest_E[expert_GR], 0, spare_E[expert_GR])
    R, P = G * S * K, num_places(G * S * K, num_experts, sizes)
    # each dropped choice gets a row of its own beyond the last, so that rows are unique
    row_R = jnp.where(kept_GR.reshape(-1), row_GR.reshape(-1), P + jnp.arange(R))
    choice_P = jnp.full(P, R, jnp.int32).at[row_R].set(jnp.arange(R, dtype=jnp.int32), mode="drop", unique_indices=True)
    end_E = jnp.cumsum(tiles_E)
    tile_I = jnp.arange(R // largest + num_experts, dtype=jnp.int32)
    expert_I = jnp.minimum(jnp.searchsorted(end_E, tile_I, side="right"), num_experts - 1).astype(jnp.int32)
    number_I = tile_I - (end_E - tiles_E)[expert_I]  # within its expert
    row_I = first_E[expert_I] + jnp.where(number_I == 0, 0, step_N[size_E][expert_I] + (number_I - 1) * largest)
    kind_I = jnp.where(number_I == 0, size_E[expert_I], len(sizes))
    kind_I = jnp.where(tile_I < end_E[-1], kind_I, len(sizes) + 1)
    order_I = jnp.argsort(kind_I, stable=True)
    bound_N = jnp.searchsorted(kind_I[order_I], jnp.arange(len(sizes) + 2)).astype(jnp.int32)
    return Tiles(expert_I[order_I], row_I[order_I], bound_N, choice_P)
