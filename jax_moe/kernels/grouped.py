"""Dropless by sorting: rows grouped by expert, padded per expert to whole blocks, one product per block.

Work is K * S rows plus at most one block an expert, whatever E is; the one-hot reference does E * S rows.
"""

import jax.numpy as jnp

from jax_moe.dims import Array, Float, Int
from jax_moe.dispatch import Moves, Slots
from jax_moe.kernels.moves import choice_of_place, combine_choices, places_to_choices, tokens_to_places, weight_of_place
from jax_moe.routing import Routing


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows in a block: about half an expert's fair share, a power of two from 8 to 128."""
    share = max(num_rows // (2 * num_experts), 1)
    return min(max(1 << (share.bit_length() - 1), 8), 128)


def block_plan(
    expert_R: Int[Array, " R"], num_experts: int, rows: int
) -> tuple[Int[Array, " R"], Int[Array, " blocks"], int]:
    """Each row's place among the padded rows, each block's expert, and the number of blocks."""
    num_blocks = -(-expert_R.shape[0] // rows) + num_experts
    onehot_RE = (expert_R[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    rank_RE = jnp.cumsum(onehot_RE, axis=0) - onehot_RE
    count_E = onehot_RE.sum(axis=0)
    last_block_E = jnp.cumsum(-(-count_E // rows))
    first_row_E = (last_block_E - (-(-count_E // rows))) * rows
    place_R = first_row_E[expert_R] + jnp.take_along_axis(rank_RE, expert_R[:, None], axis=1)[:, 0]
    expert_of_block = jnp.searchsorted(last_block_E, jnp.arange(num_blocks), side="right")
    return place_R, jnp.minimum(expert_of_block, num_experts - 1), num_blocks


def grouped_dispatch(x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves) -> Float[Array, "G S D"]:
    """Same answer as `einsum_dispatch` without a capacity; padding's choices keep weight 0."""
    G, S, D = x_GSD.shape
    expert_R = routing.expert_GSK.reshape(-1)
    rows = block_rows(expert_R.shape[0], moves.config.num_experts)
    place_R, expert_of_block, num_blocks = block_plan(expert_R, moves.config.num_experts, rows)
    choice_P, place_SK = choice_of_place(place_R, num_blocks * rows), place_R.reshape(G * S, -1)
    x_PD = tokens_to_places(x_GSD.reshape(G * S, D), choice_P, place_SK)
    if moves.config.expert.weight_on == "input":
        x_PD = weight_of_place(x_PD, slots, choice_P)
    y_blocks = moves.apply(x_PD.reshape(num_blocks, rows, D), expert_of_block)
    if moves.dropout is not None:
        y_blocks = moves.dropout(y_blocks)
    y_SKD = places_to_choices(y_blocks.reshape(num_blocks * rows, D), choice_P, place_SK)
    return combine_choices(y_SKD.reshape(G, S, -1, D), slots, moves)
