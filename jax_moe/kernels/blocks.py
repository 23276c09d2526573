"""Dropless in blocks: rows sorted by expert, every expert's rows padded with zeros to whole blocks.

On a Hopper GPU the products run in kernels of our own (`kernels/hopper.py`), elsewhere in `jax.lax.ragged_dot`. Tokens
go to rows and answers come back in one pass over memory each, forward and backward.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_moe.config.moe import ExpertConfig
from jax_moe.dims import Array, Float, Int, wide
from jax_moe.dispatch import Moves, Slots
from jax_moe.experts import Weights, hidden_units
from jax_moe.kernels import devices
from jax_moe.kernels.moves import choice_of_place, combine_choices, no_gradient, places_to_choices, rows_at
from jax_moe.kernels.moves import weight_of_place as weighted_rows
from jax_moe.kernels.tiles import rank_choices
from jax_moe.routing import Routing

SMALL_BLOCK = 8  # rows of a block where no kernel asks for more


class Blocks(NamedTuple):
    """Which rows are whose: place p, a row, lies in block p // block."""

    choice_P: Int[Array, " P"]  # the choice s * K + k in each row; S * K in a spare row
    place_R: Int[Array, " R"]  # the row of each choice; P for a dropped one
    expert_I: Int[Array, " I"]  # each block's expert; the last one for blocks that none uses
    first_E: Int[Array, " E"]  # each expert's first block
    blocks_E: Int[Array, " E"]  # how many it has, at least 1

    @property
    def block(self) -> int:
        """Rows of a block."""
        return self.choice_P.shape[0] // self.expert_I.shape[0]


Product = Callable[[Float[Array, "P D"], Float[Array, "E D F"], Blocks], Float[Array, "P F"]]


def blocks_dispatch(
    x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S D"]:
    """Same answer as `einsum_dispatch`."""
    G, S, D = x_GSD.shape
    config, K = moves.config, moves.config.top_k
    kernel = devices.hopper_serves(x_GSD.dtype, config.model_dim, config.expert_dim)
    blocks = lay_blocks(routing, slots, moves.capacity, config.num_experts, devices.BLOCK if kernel else SMALL_BLOCK)
    place_SK = blocks.place_R.reshape(G * S, K)
    x_PD = tokens_to_rows(x_GSD.reshape(G * S, D), blocks.choice_P, place_SK)
    if config.expert.weight_on == "input":
        x_PD = weighted_rows(x_PD, slots, blocks.choice_P)
    product = hopper_product if kernel else xla_product
    y_PD = moves.dropout(blocks_ffn(x_PD, moves.weights, blocks, config.expert, product))
    if moves.keep_GSKD is not None:
        y_SKD = places_to_choices(y_PD, blocks.choice_P, place_SK)
        return combine_choices(y_SKD.reshape(G, S, K, D), slots, moves)
    factor_GSK = slots.weight_GSK
    if config.expert.weight_on == "input":
        factor_GSK = (slots.slot_GSK < moves.capacity).astype(factor_GSK.dtype)
    return weighted_sum(y_PD, factor_GSK.reshape(G * S, K), blocks.choice_P, place_SK).reshape(G, S, D)


def lay_blocks(routing: Routing, slots: Slots, capacity: int, num_experts: int, block: int) -> Blocks:
    """Every expert's choices in rows of its own, in the order of their slots; at least one block each."""
    choices, count_E = rank_choices(routing, slots, capacity, num_experts)
    R = choices.expert_R.shape[0]
    num_blocks = -(-R // block) + num_experts
    blocks_E = jnp.maximum(-(-count_E // block), 1).astype(jnp.int32)
    end_E = jnp.cumsum(blocks_E, dtype=jnp.int32)
    first_E = end_E - blocks_E
    place_R = first_E[choices.expert_R] * block + choices.rank_R
    place_R = jnp.where(choices.kept_R, place_R, num_blocks * block).astype(jnp.int32)
    expert_I = (jnp.arange(num_blocks)[:, None] >= end_E).sum(axis=1, dtype=jnp.int32)
    expert_I = jnp.minimum(expert_I, num_experts - 1)
    return Blocks(choice_of_place(place_R, num_blocks * block), place_R, expert_I, first_E, blocks_E)


def hopper_product(x_PD: Array, weight_EDF: Array, blocks: Blocks) -> Array:
    """Rows times their experts' weights in our own kernels."""
    from jax_moe.kernels import hopper

    return hopper.block_product(x_PD, weight_EDF, blocks.expert_I, blocks.first_E, blocks.blocks_E)


def xla_product(x_PD: Array, weight_EDF: Array, blocks: Blocks) -> Array:
    """Rows times their experts' weights in `jax.lax.ragged_dot`."""
    return jax.lax.ragged_dot(x_PD, weight_EDF, blocks.blocks_E * blocks.block)


def blocks_ffn(
    x_PD: Float[Array, "P D"], weights: Weights, blocks: Blocks, config: ExpertConfig, product: Product
) -> Float[Array, "P D"]:
    """The answer of each row's expert; in spare rows what it answers to zeros, which nobody reads."""
    expert_P = jnp.repeat(blocks.expert_I, blocks.block, total_repeat_length=x_PD.shape[0])

    def linear(x: Array, name: str) -> Array:
        y = product(x, weights[name].astype(x.dtype), blocks)
        return y + weights[f"{name}_bias"].astype(x.dtype)[expert_P] if config.bias else y

    gate_PF = linear(x_PD, "gate")[None] if config.gated else None
    return linear(hidden_units(linear(x_PD, "up")[None], gate_PF, config)[0], "down")


@jax.custom_vjp
def tokens_to_rows(
    x_SD: Float[Array, "S D"], choice_P: Int[Array, " P"], place_SK: Int[Array, "S K"]
) -> Float[Array, "P D"]:
    """The token of each row; zeros in a spare row. Backward, a token's K rows are summed as they are read."""
    return rows_at(x_SD, choice_P // place_SK.shape[1])


def _tokens_forward(x_SD: Array, choice_P: Array, place_SK: Array) -> tuple[Array, tuple]:
    return tokens_to_rows(x_SD, choice_P, place_SK), (choice_P, place_SK)


def _tokens_backward(saved: tuple, g_PD: Array) -> tuple:
    choice_P, place_SK = saved
    rows = (rows_at(g_PD, place_S).astype(wide(g_PD.dtype)) for place_S in place_SK.T)
    return sum(rows).astype(g_PD.dtype), *no_gradient((choice_P, place_SK))  # type: ignore[union-attr]


@jax.custom_vjp
def weighted_sum(
    y_PD: Float[Array, "P D"], weight_SK: Float[Array, "S K"], choice_P: Int[Array, " P"], place_SK: Int[Array, "S K"]
) -> Float[Array, "S D"]:
    """Each token's answers times their weights, summed in the weights' dtype as they are read."""
    pairs = zip(weight_SK.T, place_SK.T, strict=True)
    return sum(weight_S[:, None] * rows_at(y_PD, place_S) for weight_S, place_S in pairs).astype(y_PD.dtype)  # type: ignore[union-attr]


def _sum_forward(y_PD: Array, weight_SK: Array, choice_P: Array, place_SK: Array) -> tuple[Array, tuple]:
    return weighted_sum(y_PD, weight_SK, choice_P, place_SK), (y_PD, weight_SK, choice_P, place_SK)


def _sum_backward(saved: tuple, g_SD: Array) -> tuple:
    y_PD, weight_SK, choice_P, place_SK = saved
    g_PD = rows_at(g_SD, choice_P // place_SK.shape[1]).astype(weight_SK.dtype)
    g_y_PD = rows_at(weight_SK.reshape(-1), choice_P)[:, None] * g_PD
    g_weight_P = jnp.where(choice_P < weight_SK.size, (y_PD.astype(weight_SK.dtype) * g_PD).sum(axis=1), 0)
    return g_y_PD.astype(y_PD.dtype), rows_at(g_weight_P, place_SK), *no_gradient((choice_P, place_SK))


tokens_to_rows.defvjp(_tokens_forward, _tokens_backward)
weighted_sum.defvjp(_sum_forward, _sum_backward)
