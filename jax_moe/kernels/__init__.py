"""Faster dispatchers under the reference's signature, and the choice among them."""

from collections.abc import Callable

from jax_moe.config import MoEConfig
from jax_moe.dispatch import einsum_dispatch
from jax_moe.kernels.gather import gather_dispatch
from jax_moe.kernels.grouped import grouped_dispatch

DISPATCHERS: dict[str, Callable] = {"einsum": einsum_dispatch, "gather": gather_dispatch, "grouped": grouped_dispatch}


def choose_dispatcher(config: MoEConfig) -> Callable:
    """The contract's dispatcher; "auto" is `gather` with a capacity and `grouped` without."""
    if config.dispatcher != "auto":
        return DISPATCHERS[config.dispatcher]
    return gather_dispatch if config.capacity is not None else grouped_dispatch
