"""Faster dispatchers with the signature of `einsum_dispatch`, and the choice among them."""

from collections.abc import Callable

import jax

from jax_moe.config.moe import MoEConfig
from jax_moe.dims import Array, DTypeLike, Float
from jax_moe.dispatch import Moves, Slots, einsum_dispatch, with_identity
from jax_moe.kernels import devices
from jax_moe.kernels.blocks import blocks_dispatch
from jax_moe.kernels.chosen import are_few, chosen_dispatch
from jax_moe.kernels.gather import gather_dispatch
from jax_moe.kernels.grouped import grouped_dispatch
from jax_moe.kernels.ragged import ragged_dispatch
from jax_moe.routing import Routing

DISPATCHERS: dict[str, Callable] = {
    "einsum": einsum_dispatch, "gather": gather_dispatch, "grouped": grouped_dispatch, "ragged": ragged_dispatch,
    "blocks": blocks_dispatch, "chosen": chosen_dispatch,
}
IN_PLACE = chosen_dispatch, grouped_dispatch

# For a group of S tokens, one-hot products cost 4 * S * K * D operations per token and the experts 6 * K * D * F. While
# 12 * S <= F they cost at most 1/18 of the experts, and on a TPU less than gathers (docs/performance.md).
EXPERT_DIM_PER_TOKEN = 12


def capacity_dispatch(
    x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S D"]:
    """`einsum` on TPU if groups are small relative to the experts' width; else `gather`."""
    small = EXPERT_DIM_PER_TOKEN * x_GSD.shape[1] <= moves.config.expert_dim
    dispatch = einsum_dispatch if small and jax.default_backend() == "tpu" else gather_dispatch
    return dispatch(x_GSD, routing, slots, moves)


def dropless_dispatch(
    x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S D"]:
    """The dispatcher that `choose_dropless` gives for this input."""
    dispatch = choose_dropless(x_GSD.shape[0] * x_GSD.shape[1], x_GSD.dtype, moves.config)
    return dispatch(x_GSD, routing, slots, moves)


def choose_dropless(num_tokens: int, dtype: DTypeLike, config: MoEConfig) -> Callable:
    """`chosen` for few tokens; else `grouped` on CPU, `blocks` on a Hopper GPU, and `ragged` on other accelerators."""
    if are_few(num_tokens, config):
        return chosen_dispatch
    if jax.default_backend() == "cpu":
        return grouped_dispatch
    kernel = devices.hopper_serves(dtype, config.inner_dim, config.expert_dim)
    return blocks_dispatch if kernel else ragged_dispatch


def reads_in_place(num_tokens: int, dtype: DTypeLike, config: MoEConfig) -> bool:
    """Whether the contract's dispatcher reads, of a stack of many layers' experts, the chosen ones alone."""
    automatic = config.dispatcher == "auto"
    return (choose_dropless(num_tokens, dtype, config) if automatic else DISPATCHERS[config.dispatcher]) in IN_PLACE


def choose_dispatcher(config: MoEConfig) -> Callable:
    """The contract's dispatcher; "auto" is `capacity_dispatch` with a capacity, and `dropless_dispatch` without one."""
    automatic = capacity_dispatch if config.capacity is not None else dropless_dispatch
    chosen = automatic if config.dispatcher == "auto" else DISPATCHERS[config.dispatcher]
    return with_identity(chosen) if config.identity_experts else chosen
