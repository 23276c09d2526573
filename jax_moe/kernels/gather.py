"""Capacity buffers filled and read by index: the slots of the one-hot reference without its cost of S * E * C * D."""

import jax.numpy as jnp

from jax_moe.dims import Array, Float
from jax_moe.dispatch import Moves, Slots
from jax_moe.kernels.moves import choice_of_place, combine_choices, places_to_choices, tokens_to_places, weight_of_place
from jax_moe.routing import Routing


def gather_dispatch(
    x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S D"]:
    """Same answer as `einsum_dispatch`: each slot reads its token, each choice reads its slot."""
    G, S, D = x_GSD.shape
    E, C = moves.config.num_experts, moves.capacity
    if C == 0:  # a short prompt with `below_one="drop_all"`: there is no slot to read
        return jnp.zeros_like(x_GSD)
    # places run over experts, then groups, then slots, so that the rows of an expert are contiguous
    group_G11 = jnp.arange(G, dtype=jnp.int32)[:, None, None]
    place_GSK = jnp.where(slots.slot_GSK < C, (routing.expert_GSK * G + group_G11) * C + slots.slot_GSK, E * G * C)
    place_SK = place_GSK.reshape(G * S, -1)
    choice_P = choice_of_place(place_SK.reshape(-1), E * G * C)
    x_PD = tokens_to_places(x_GSD.reshape(G * S, D), choice_P, place_SK)
    if moves.config.expert.weight_on == "input":
        x_PD = weight_of_place(x_PD, slots, choice_P)
    y_ECD = moves.dropout(moves.apply(x_PD.reshape(E, G * C, D), None))
    y_SKD = places_to_choices(y_ECD.reshape(E * G * C, D), choice_P, place_SK)
    return combine_choices(y_SKD.reshape(G, S, -1, D), slots, moves)
