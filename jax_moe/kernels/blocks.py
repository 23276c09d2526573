"""Dropless in blocks: rows sorted by expert, every expert's rows padded with zeros to whole blocks.

On a Hopper GPU the products run in kernels of our own (`kernels/hopper.py`), elsewhere in `jax.lax.ragged_dot`. Tokens
go to rows and answers come back in one pass over memory each, forward and backward.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_moe.config.moe import ExpertConfig
from jax_moe.dims import Array, Float, Int
from jax_moe.dispatch import Moves, Slots
from jax_moe.experts import Weights, answer, hidden_units
from jax_moe.kernels import devices
from jax_moe.kernels.moves import (
    choice_of_place,
    combine_choices,
    places_to_choices,
    tokens_to_places,
    weight_of_place,
    weighted_sum,
)
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
    x_PD = tokens_to_places(x_GSD.reshape(G * S, D), blocks.choice_P, place_SK)
    if config.expert.weight_on == "input":
        x_PD = weight_of_place(x_PD, slots, blocks.choice_P)
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
    y_PD = linear(hidden_units(linear(x_PD, "up")[None], gate_PF, config)[0], "down")
    return answer(y_PD, weights, config, expert_P)
