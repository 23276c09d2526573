"""Rows sorted by expert and cut into tiles: every tile belongs to one expert and has one of a few sizes.

The rows of an expert form a block: the first tile takes the remainder, in the smallest size that holds it, and full
tiles follow. So the work is that of the choices plus less than one step per expert, for any number of experts and any
load.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_moe.dims import Array, Bool, Int
from jax_moe.dispatch import Slots
from jax_moe.routing import Routing


class Tiles(NamedTuple):
    """The tiles in the order of their sizes, full tiles last, and the choice of each row."""

    expert_I: Int[Array, " I"]  # the tile's expert
    row_I: Int[Array, " I"]  # the tile's first row
    bound_N: Int[Array, " N"]  # index of each size's first tile, then of the first full tile, then the number of tiles
    choice_P: Int[Array, " P"]  # the choice s * K + k in each row; S * K in a spare row


class Choices(NamedTuple):
    """All choices of all groups in flat order."""

    expert_R: Int[Array, " R"]
    kept_R: Bool[Array, " R"]  # owns a slot
    rank_R: Int[Array, " R"]  # how many kept choices of the same expert come before; meaningless for a dropped choice


class Blocks(NamedTuple):
    """Each expert's rows: spare rows end the first tile, full tiles have none."""

    first_E: Int[Array, " E"]  # the block's first row
    size_E: Int[Array, " E"]  # which of the sizes the first tile has
    rest_E: Int[Array, " E"]  # rows of the first tile that hold a choice
    spare_E: Int[Array, " E"]  # rows of the first tile that hold none
    tiles_E: Int[Array, " E"]  # number of tiles; 0 without choices


def tile_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Multiples of a step: an eighth of an expert's fair share, as a power of two from 8 to 64. Fewer for few rows.

    Smaller steps waste less on padding, larger tiles read the weights less often, and each size is a loop to compile.
    """
    share = max(num_rows // num_experts, 1)
    step = min(max(1 << (share // 8).bit_length() - 1, 8), 64) if share >= 8 else 8
    if num_rows < 2048:
        return tuple(step * many for many in (1, 2, 4, 8) if step * many < 2 * num_rows) or (step,)
    return tuple(step * many for many in range(1, 13))


def num_places(num_rows: int, num_experts: int, sizes: tuple[int, ...]) -> int:
    """Number of rows of a buffer that holds every tile."""
    widest = max(np.diff((0, *sizes)))
    return num_rows + num_experts * int(widest)


def plan_tiles(routing: Routing, slots: Slots, capacity: int, num_experts: int, sizes: tuple[int, ...]) -> Tiles:
    """The tiles of all choices that own a slot; an expert without any has none: its weights are not read."""
    num_rows = slots.slot_GSK.size
    choices, count_E = rank_choices(routing, slots, capacity, num_experts)
    blocks = lay_out(count_E, sizes)
    choice_P = fill_rows(choices, blocks, num_places(num_rows, num_experts, sizes))
    return Tiles(*list_tiles(blocks, num_rows // sizes[-1] + num_experts, sizes), choice_P)


def rank_choices(
    routing: Routing, slots: Slots, capacity: int, num_experts: int
) -> tuple[Choices, Int[Array, " E"]]:
    """The choices with their ranks, and the number of kept choices of each expert.

    A slot is a rank within one group: the expert's choices in earlier groups come before it.
    """
    G = slots.slot_GSK.shape[0]
    expert_GR, slot_GR = routing.expert_GSK.reshape(G, -1), slots.slot_GSK.reshape(G, -1)
    kept_GR = slot_GR < capacity
    group_GR = jnp.broadcast_to(jnp.arange(G)[:, None], expert_GR.shape)
    count_GE = jnp.zeros((G, num_experts), jnp.int32).at[group_GR, expert_GR].add(kept_GR.astype(jnp.int32))
    before_GE = jnp.cumsum(count_GE, axis=0) - count_GE
    rank_GR = slot_GR + jnp.take_along_axis(before_GE, expert_GR, axis=1)
    return Choices(expert_GR.reshape(-1), kept_GR.reshape(-1), rank_GR.reshape(-1)), count_GE.sum(axis=0)


def lay_out(count_E: Int[Array, " E"], sizes: tuple[int, ...]) -> Blocks:
    """Consecutive blocks of experts with these numbers of kept choices."""
    largest, size_N = sizes[-1], jnp.asarray(sizes, jnp.int32)
    tiles_E = -(-count_E // largest)
    rest_E = count_E - jnp.maximum(tiles_E - 1, 0) * largest
    size_E = jnp.searchsorted(size_N, rest_E).astype(jnp.int32)
    spare_E = jnp.where(tiles_E > 0, size_N[size_E] - rest_E, 0)
    rows_E = count_E + spare_E
    return Blocks(jnp.cumsum(rows_E) - rows_E, size_E, rest_E, spare_E, tiles_E)


def fill_rows(choices: Choices, blocks: Blocks, num_places: int) -> Int[Array, " P"]:
    """The choice in each row of the blocks; R, the number of choices, in a spare row."""
    expert_R, kept_R, rank_R = choices
    R = rank_R.shape[0]
    in_first_R = rank_R < blocks.rest_E[expert_R]
    row_R = blocks.first_E[expert_R] + rank_R + jnp.where(in_first_R, 0, blocks.spare_E[expert_R])
    # each dropped choice gets a row of its own beyond the last, so that rows are unique
    row_R = jnp.where(kept_R, row_R, num_places + jnp.arange(R))
    numbers_R = jnp.arange(R, dtype=jnp.int32)
    return jnp.full(num_places, R, jnp.int32).at[row_R].set(numbers_R, mode="drop", unique_indices=True)


def list_tiles(
    blocks: Blocks, most_tiles: int, sizes: tuple[int, ...]
) -> tuple[Int[Array, " I"], Int[Array, " I"], Int[Array, " N"]]:
    """The expert and the first row of each tile, sorted by size, and the bounds between the sizes, as in `Tiles`."""
    num_experts, end_E = blocks.tiles_E.shape[0], jnp.cumsum(blocks.tiles_E)
    tile_I = jnp.arange(most_tiles, dtype=jnp.int32)
    expert_I = jnp.minimum(jnp.searchsorted(end_E, tile_I, side="right"), num_experts - 1).astype(jnp.int32)
    number_I = tile_I - (end_E - blocks.tiles_E)[expert_I]  # within its block
    first_tile_E = blocks.rest_E + blocks.spare_E  # rows of it
    before_I = jnp.where(number_I == 0, 0, first_tile_E[expert_I] + (number_I - 1) * sizes[-1])
    row_I = blocks.first_E[expert_I] + before_I
    # first tiles by size, then full tiles, then the unused end of the list
    full, unused = len(sizes), len(sizes) + 1
    kind_I = jnp.where(number_I == 0, blocks.size_E[expert_I], full)
    kind_I = jnp.where(tile_I < end_E[-1], kind_I, unused)
    order_I = jnp.argsort(kind_I, stable=True)
    bound_N = jnp.searchsorted(kind_I[order_I], jnp.arange(unused + 1)).astype(jnp.int32)
    return expert_I[order_I], row_I[order_I], bound_N
