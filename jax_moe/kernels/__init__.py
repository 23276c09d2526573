"""Faster dispatchers under the reference's signature, and the choice among them."""

from collections.abc import Callable

import jax

from jax_moe.config import MoEConfig
from jax_moe.dims import Array, Float
from jax_moe.dispatch import Moves, Slots, einsum_dispatch
from jax_moe.kernels.chosen import are_few, chosen_dispatch
from jax_moe.kernels.gather import gather_dispatch
from jax_moe.kernels.grouped import grouped_dispatch
from jax_moe.kernels.ragged import ragged_dispatch
from jax_moe.routing import Routing

DISPATCHERS: dict[str, Callable] = {
    "einsum": einsum_dispatch, "gather": gather_dispatch, "grouped": grouped_dispatch, "ragged": ragged_dispatch,
    "chosen": chosen_dispatch,
}


def dropless_dispatch(x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves) -> Float[Array, "G S D"]:
    """`chosen` for few tokens; else `grouped` on CPU and `ragged` where the backend has a grouped product of its own."""
    if are_few(x_GSD.shape[0] * x_GSD.shape[1], moves.config):
        return chosen_dispatch(x_GSD, routing, slots, moves)
    grouped = grouped_dispatch if jax.default_backend() == "cpu" else ragged_dispatch
    return grouped(x_GSD, routing, slots, moves)


def choose_dispatcher(config: MoEConfig) -> Callable:
    """The contract's dispatcher; "auto" is `gather` with a capacity and `dropless_dispatch` without."""
    if config.dispatcher != "auto":
        return DISPATCHERS[config.dispatcher]
    return gather_dispatch if config.capacity is not None else dropless_dispatch
