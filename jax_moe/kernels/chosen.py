"""Few tokens: the weights of each choice's expert are gathered, and no other expert's weights are read.

Work and memory traffic grow with the S * K choices and not with E. This is the fastest dispatcher while there are fewer
choices than experts, as in generation. With more choices `grouped` reads each expert's weights only once for all its
rows.
"""

from collections.abc import Callable

import jax

from jax_moe.config.moe import ExpertConfig, MoEConfig
from jax_moe.dims import Array, Float, Int
from jax_moe.dispatch import Moves, Slots
from jax_moe.experts import Weights, expert_ffn, take_experts
from jax_moe.kernels.moves import combine_choices
from jax_moe.routing import Routing


def are_few(num_tokens: int, config: MoEConfig) -> bool:
    """Whether there are at most as many choices as experts with weights."""
    return num_tokens * config.top_k <= config.num_networks


def chosen_dispatch(
    x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S D"]:
    """Same answer as `einsum_dispatch` without a capacity; choices of padding have weight 0."""
    G, S, D = x_GSD.shape
    K = moves.config.top_k
    x_RD = x_GSD.reshape(G * S, D).repeat(K, axis=0)
    if moves.config.expert.weight_on == "input":
        x_RD = (x_RD * slots.weight_GSK.reshape(-1, 1)).astype(x_RD.dtype)
    y_R1D = moves.dropout(moves.apply(x_RD[:, None], routing.expert_GSK.reshape(-1)))
    return combine_choices(y_R1D.reshape(G, S, K, D), slots, moves)


def experts_in_place(weights: Weights, first: Int[Array, ""], config: ExpertConfig) -> Callable[[Array, Array], Array]:
    """(x_R1D, expert_R) -> y_R1D, each row with its own expert, number `first` + expert_R of the weights.

    On CPU rows are computed one after the other: a gather of [R, D, F] would write all that it reads and read it again.
    """

    def one_by_one(x_R1D: Array, expert_R: Array) -> Array:
        def row(each: tuple[Array, Array]) -> Array:
            x_1D, expert = each
            own = {name: jax.lax.dynamic_slice_in_dim(w, expert, 1) for name, w in weights.items()}
            return expert_ffn(x_1D[None], own, config)[0]

        return jax.lax.map(row, (x_R1D, expert_R))

    def together(x_R1D: Array, expert_R: Array) -> Array:
        return expert_ffn(x_R1D, take_experts(weights, expert_R), config)

    return lambda x_R1D, expert_R: jax.lax.platform_dependent(
        x_R1D, first + expert_R, cpu=one_by_one, default=together
    )
