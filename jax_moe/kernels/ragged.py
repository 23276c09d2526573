"""Dropless by sorting, with one grouped product over all rows.

The product is `jax.lax.ragged_dot`, or on TPU that of the kernels that jax ships.
"""

import jax
import jax.numpy as jnp

from jax_moe.config.moe import ExpertConfig
from jax_moe.dims import Array, Float, Int
from jax_moe.dispatch import Moves, Slots
from jax_moe.experts import Weights, answer, hidden_units
from jax_moe.kernels import devices, megablox
from jax_moe.kernels.moves import choice_of_place, combine_choices, places_to_choices, tokens_to_places, weight_of_place
from jax_moe.routing import Routing


def ragged_dispatch(
    x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S D"]:
    """Same answer as `einsum_dispatch`; dropped choices take the rows after those of all experts."""
    G, S, D = x_GSD.shape
    K, E = moves.config.top_k, moves.config.num_experts
    place_R, count_E = sorted_places(routing, slots, moves.capacity, E)
    place_SK, choice_P = place_R.reshape(G * S, K), choice_of_place(place_R, G * S * K)
    x_RD = tokens_to_places(x_GSD.reshape(G * S, D), choice_P, place_SK)
    if moves.config.expert.weight_on == "input":
        x_RD = weight_of_place(x_RD, slots, choice_P)
    y_RD = moves.dropout(ragged_ffn(x_RD, moves.weights, count_E, moves.config.expert))
    return combine_choices(places_to_choices(y_RD, choice_P, place_SK).reshape(G, S, K, D), slots, moves)


def sorted_places(
    routing: Routing, slots: Slots, capacity: int, num_experts: int
) -> tuple[Int[Array, " R"], Int[Array, " E"]]:
    """The row of each choice when rows are sorted by expert, dropped choices last; and each expert's number of rows."""
    expert_R = routing.expert_GSK.reshape(-1)
    R = expert_R.shape[0]
    queue_R = jnp.where(slots.slot_GSK.reshape(-1) < capacity, expert_R, num_experts)
    order_R = jnp.argsort(queue_R, stable=True)
    place_R = jnp.zeros(R, jnp.int32).at[order_R].set(jnp.arange(R, dtype=jnp.int32), unique_indices=True)
    end_E = jnp.searchsorted(queue_R[order_R], jnp.arange(num_experts), side="right").astype(jnp.int32)
    return place_R, jnp.diff(end_E, prepend=0)


def grouped_product(
    x_RD: Float[Array, "R D"], weight_EDF: Float[Array, "E D F"], count_E: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """Each expert's rows times its weights; zeros after the last expert's rows.

    On TPU, XLA computes the weights' gradient of `jax.lax.ragged_dot` as E masked dense products (docs/performance.md).
    """
    if devices.megablox_serves(x_RD.dtype, *weight_EDF.shape[1:]):
        return megablox.grouped_product(x_RD, weight_EDF, count_E)
    return jax.lax.ragged_dot(x_RD, weight_EDF, count_E)


def ragged_ffn(
    x_RD: Float[Array, "R D"], weights: Weights, count_E: Int[Array, " E"], config: ExpertConfig
) -> Float[Array, "R D"]:
    """The answer of each row's expert; after the last expert's rows zeros, or the biases' answer to zeros."""
    R, E = x_RD.shape[0], count_E.shape[0]
    expert_R = jnp.minimum(jnp.searchsorted(jnp.cumsum(count_E), jnp.arange(R), side="right"), E - 1)

    def linear(x: Array, name: str) -> Array:
        y = grouped_product(x, weights[name].astype(x.dtype), count_E)
        return y + weights[f"{name}_bias"].astype(x.dtype)[expert_R] if config.bias else y

    gate_RF = linear(x_RD, "gate")[None] if config.gated else None
    y_RD = linear(hidden_units(linear(x_RD, "up")[None], gate_RF, config)[0], "down")
    return answer(y_RD, weights, config, expert_R)
