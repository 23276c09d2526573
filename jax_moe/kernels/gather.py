"""Capacity buffers filled and emptied by index: the same slots as the one-hot reference without its S * E * C * D."""

import jax
import jax.numpy as jnp

from jax_moe.dims import Array, Float
from jax_moe.dispatch import Moves, Slots, apply_keep
from jax_moe.routing import Routing, wide


def gather_dispatch(x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves) -> Float[Array, "G S D"]:
    """Same answer as `einsum_dispatch`: each slot reads its token, each choice reads its slot."""
    E, C, dtype = moves.config.num_experts, moves.capacity, x_GSD.dtype
    on_input = moves.config.expert.weight_on == "input"
    K = routing.expert_GSK.shape[-1]

    def fill(x_SD: Array, expert_SK: Array, slot_SK: Array, weight_SK: Array) -> Array:
        """Buffers [E, C, D]; an empty slot holds zeros. Dropped choices point past the end and are not written."""
        S = x_SD.shape[0]
        place_R = jnp.where(slot_SK < C, expert_SK * C + slot_SK, E * C).reshape(-1)
        choice_of_slot = jnp.full((E * C,), S * K, jnp.int32).at[place_R].set(jnp.arange(S * K, dtype=jnp.int32), mode="drop")
        rows = x_SD.at[choice_of_slot // K].get(mode="fill", fill_value=0)
        if on_input:
            rows = (rows * weight_SK.reshape(-1).at[choice_of_slot].get(mode="fill", fill_value=0)[:, None]).astype(dtype)
        return rows.reshape(E, C, -1)

    x_GECD = jax.vmap(fill)(x_GSD, routing.expert_GSK, slots.slot_GSK, slots.weight_GSK)
    y_GECD = moves.apply(x_GECD, None)
    if moves.keep_GSKD is None and moves.dropout is not None:
        y_GECD = moves.dropout(y_GECD)

    def empty(y_ECD: Array, expert_SK: Array, slot_SK: Array) -> Array:
        place_SK = jnp.where(slot_SK < C, expert_SK * C + slot_SK, E * C)
        return y_ECD.reshape(E * C, -1).at[place_SK].get(mode="fill", fill_value=0)

    y_GSKD = jax.vmap(empty)(y_GECD, routing.expert_GSK, slots.slot_GSK).astype(wide(dtype))
    if moves.keep_GSKD is not None:
        y_GSKD = apply_keep(y_GSKD, moves.keep_GSKD, moves.config.expert.dropout)
    factor_GSK = (slots.slot_GSK < C).astype(wide(dtype)) if on_input else slots.weight_GSK
    return jnp.einsum("GSK,GSKD->GSD", factor_GSK, y_GSKD).astype(dtype)
