"""Few tokens: the weights of each choice's expert are gathered, and no other expert's weights are read.

Work and memory traffic grow with the S * K choices and not with E. This is the fastest dispatcher while there are fewer
choices than experts, as in generation. With more choices `grouped` reads each expert's weights only once for all its
rows.
"""

from functools import partial

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


def apply_experts(
    config: ExpertConfig, weights: Weights, first: Int[Array, ""] | int, x_ECD: Float[Array, "E C D"],
    expert_E: Int[Array, " E"] | None,
) -> Float[Array, "E C D"]:
    """Every expert's answer to its rows; with `expert_E` row e is answered by expert `first` + expert_E[e]."""
    if expert_E is None:
        return expert_ffn(x_ECD, weights, config)
    return _answers(config, weights, first + expert_E, x_ECD)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _answers(config: ExpertConfig, weights: Weights, expert_E: Array, x_ECD: Array) -> Array:
    """On CPU one after the other: a gather of [E, D, F] would write all that it reads and read it again."""

    def one_by_one(weights: Weights, expert_E: Array, x_ECD: Array) -> Array:
        def answer(each: tuple[Array, Array]) -> Array:
            x_CD, expert = each
            own = {name: jax.lax.dynamic_slice_in_dim(w, expert, 1) for name, w in weights.items()}
            return expert_ffn(x_CD[None], own, config)[0]

        return jax.lax.map(answer, (x_ECD, expert_E))

    together = partial(_gathered, config)
    return jax.lax.platform_dependent(weights, expert_E, x_ECD, cpu=one_by_one, default=together)


def _gathered(config: ExpertConfig, weights: Weights, expert_E: Array, x_ECD: Array) -> Array:
    return expert_ffn(x_ECD, take_experts(weights, expert_E), config)


@_answers.defjvp
def _(config: ExpertConfig, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Of the gather: the loop's gradient would hold a copy of all weights for each row."""
    weights, expert_E, x_ECD = primals
    moved = tangents[0], tangents[2]
    return jax.jvp(lambda weights, x_ECD: _gathered(config, weights, expert_E, x_ECD), (weights, x_ECD), moved)
