"""Routing -> expert buffers, and back: groups, queues, drops, and the dense one-hot reference.

A dispatcher is a function (x_GSD, routing, slots, moves) -> y_GSD. The faster dispatchers in `kernels/` have the same
signature. All of them share `assign_slots`, so they drop the same tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_moe.config.moe import MoEConfig, Priority, RouterConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, Shaped, wide
from jax_moe.dropout import apply_keep, draw_keep, dropout
from jax_moe.routing import Routing, safe_denominator

LARGEST_KEY = 2**31 - 1  # int32: queue and turn are packed into a single sort key up to this value


class Slots(NamedTuple):
    """The position of each choice in its expert's queue, after drops."""

    slot_GSK: Int[Array, "G S K"]  # 0 .. C-1; exactly C for a choice that was dropped or belongs to padding
    weight_GSK: Float[Array, "G S K"]  # 0 for a dropped choice


class Moves(NamedTuple):
    """What a dispatcher needs besides tokens, routing and slots."""

    config: MoEConfig
    capacity: int
    apply: Callable  # the experts, (x_ECD, expert_E or None) -> y_ECD; expert_E picks the weights for each row of E
    weights: Mapping[str, Array]  # the parameters of the same experts, for a dispatcher with a backward of its own
    first_expert: Int[Array, ""] | int = 0  # the first of them among `weights`: not 0 in a stack of layers' experts
    dropout_key: PRNGKeyArray | None = None  # draws the dropout mask
    keep_GSKD: Bool[Array, "G S K D"] | None = None  # a given dropout mask

    def dropout(self, y: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """Answers of any shape with a freshly drawn dropout mask; unchanged without a key."""
        return dropout(y, self.config.expert.dropout, self.dropout_key)

    def keep(self, shape: tuple[int, ...]) -> Bool[Array, "*any"] | None:
        """The dropout mask of all choices, given or drawn; None if there is no dropout."""
        if self.keep_GSKD is not None:
            return self.keep_GSKD.reshape(shape)
        rate = self.config.expert.dropout
        return None if self.dropout_key is None or rate == 0 else draw_keep(self.dropout_key, rate, shape)


def split_groups(x_BT: Shaped[Array, "B T *rest"], group_size: int) -> Shaped[Array, "G S *rest"]:
    """Tokens in flat order cut into groups of S, at least one group; the last group is padded with zeros."""
    B, T, *rest = x_BT.shape
    num_groups = max(-(-B * T // group_size), 1)
    flat = x_BT.reshape(B * T, *rest)
    if num_groups * group_size != B * T:
        flat = jnp.pad(flat, [(0, num_groups * group_size - B * T)] + [(0, 0)] * len(rest))
    return flat.reshape(num_groups, group_size, *rest)


def merge_groups(x_GS: Shaped[Array, "G S *rest"], batch_size: int, num_positions: int) -> Shaped[Array, "B T *rest"]:
    """Inverse of `split_groups`."""
    G, S, *rest = x_GS.shape
    return x_GS.reshape(G * S, *rest)[: batch_size * num_positions].reshape(batch_size, num_positions, *rest)


def queue_positions(
    expert_GSK: Int[Array, "G S K"],
    weight_GSK: Float[Array, "G S K"],
    num_experts: int,
    priority: Priority,
    mask_GS: Bool[Array, "G S"] | None = None,
) -> Int[Array, "G S K"]:
    """The number of choices before each choice in its expert's queue (int32: bf16 counts collide above 256)."""
    G, S, K = expert_GSK.shape
    R = S * K
    queue_GSK = expert_GSK if mask_GS is None else jnp.where(mask_GS[..., None], expert_GSK, num_experts)
    turn_GR = _turns(jax.lax.stop_gradient(weight_GSK), priority).reshape(G, R)
    return jax.vmap(partial(_ranks, num_queues=num_experts + 1))(queue_GSK.reshape(G, R), turn_GR).reshape(G, S, K)


def _turns(weight_GSK: Float[Array, "G S K"], priority: Priority) -> Int[Array, "G S K"]:
    """The order in which the choices of a group take their places: a permutation of 0 .. S * K - 1."""
    G, S, K = weight_GSK.shape
    if priority == "token":
        return jnp.broadcast_to(jnp.arange(S * K, dtype=jnp.int32).reshape(S, K), (G, S, K))
    if priority == "probability":
        return _descending(weight_GSK.reshape(G, S * K)).reshape(G, S, K)
    token_GS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (G, S))
    if priority == "batch":
        token_GS = _descending(weight_GSK.max(axis=2))
    return jnp.arange(K, dtype=jnp.int32) * S + token_GS[..., None]


def _descending(weight_GR: Float[Array, "G R"]) -> Int[Array, "G R"]:
    """The rank of each weight in its group, highest first; on equal weights the lower index first."""
    return jax.vmap(_inverse)(jnp.argsort(-weight_GR, axis=1, stable=True))


def _ranks(queue_R: Int[Array, " R"], turn_R: Int[Array, " R"], num_queues: int) -> Int[Array, " R"]:
    """The rank of each choice in its queue, in the order of turns. One sort; one-hot sums would cost R * E."""
    R = queue_R.shape[0]
    if num_queues * R <= LARGEST_KEY:
        sorted_R = jax.lax.sort(queue_R * R + turn_R)
        sorted_queue_R, sorted_turn_R = sorted_R // R, sorted_R % R
    else:
        sorted_queue_R, sorted_turn_R = jax.lax.sort((queue_R, turn_R), num_keys=2)
    first_Q = jnp.searchsorted(sorted_queue_R, jnp.arange(num_queues)).astype(jnp.int32)
    rank_R = jnp.arange(R, dtype=jnp.int32) - first_Q[sorted_queue_R]
    by_turn_R = jnp.zeros(R, jnp.int32).at[sorted_turn_R].set(rank_R, unique_indices=True)
    return by_turn_R[turn_R]


def _inverse(order_R: Int[Array, " R"]) -> Int[Array, " R"]:
    """The inverse of a permutation."""
    place_R = jnp.arange(order_R.size, dtype=jnp.int32)
    return jnp.zeros(order_R.shape, jnp.int32).at[order_R].set(place_R, unique_indices=True)


def assign_slots(
    routing: Routing,
    config: MoEConfig,
    capacity: int,
    mask_GS: Bool[Array, "G S"] | None = None,
    capacity_limit: Int[Array, ""] | None = None,
) -> Slots:
    """Slots of the choices within the capacity; the others are dropped.

    `capacity_limit`, at most `capacity`, is a traced queue length for growing prompts.
    """
    priority = config.capacity.priority if config.capacity else "token"
    position_GSK = queue_positions(routing.expert_GSK, routing.weight_GSK, config.num_experts, priority, mask_GS)
    position_GSK = _without_queue(position_GSK, routing.expert_GSK, config)
    kept_GSK = position_GSK < (capacity if capacity_limit is None else capacity_limit)
    if mask_GS is not None:
        kept_GSK &= mask_GS[..., None]
    weight_GSK = jnp.where(kept_GSK, routing.weight_GSK, 0)
    if config.capacity is not None and config.capacity.renormalise_after_drop:
        total_GS1 = weight_GSK.sum(axis=-1, keepdims=True)
        weight_GSK = weight_GSK / safe_denominator(total_GS1) * config.router.scale
    return Slots(jnp.where(kept_GSK, position_GSK, capacity), weight_GSK)


def _without_queue(position_GSK: Array, expert_GSK: Array, config: MoEConfig) -> Array:
    """Choices of experts that return their input take no places: each is as the first."""
    if not config.identity_experts:
        return position_GSK
    return jnp.where(expert_GSK < config.num_networks, position_GSK, 0)


def round_weights(slots: Slots, config: MoEConfig, dtype: DTypeLike) -> Slots:
    """Weights rounded to the input's dtype if the contract says so (Qwen), else in fp32 or wider (Mixtral)."""
    if config.router.weight_dtype == "float32":
        return slots
    return slots._replace(weight_GSK=slots.weight_GSK.astype(dtype).astype(slots.weight_GSK.dtype))


def einsum_dispatch(
    x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S D"]:
    """The reference: one-hot dispatch and combine tensors [G, S, E, C] contracted by einsum (GShard, arXiv 2006.16668).

    They cost 2 * S * E * C * D besides the experts, so keep groups bounded. Without a capacity every expert sees every
    token (E / K times the work), and the tensors are [G, S, E].
    """
    config, dtype = moves.config, x_GSD.dtype
    kept_GSK1 = (slots.slot_GSK < moves.capacity)[..., None].astype(dtype)
    choice_GSKE = jax.nn.one_hot(routing.expert_GSK, config.num_experts, dtype=dtype) * kept_GSK1
    weight_GSKE = slots.weight_GSK[..., None] * choice_GSKE.astype(slots.weight_GSK.dtype)
    if config.capacity is None:
        return _all_tokens(x_GSD, choice_GSKE, weight_GSKE, moves)
    slot_GSKC = jax.nn.one_hot(slots.slot_GSK, moves.capacity, dtype=dtype)  # all zeros at slot C: dropped
    return _tokens_in_slots(x_GSD, choice_GSKE, weight_GSKE, slot_GSKC, moves)


def _all_tokens(x_GSD: Array, choice_GSKE: Array, weight_GSKE: Array, moves: Moves) -> Float[Array, "G S D"]:
    """Every expert answers every token; the combine tensor picks and weights the chosen answers."""
    G, S, D = x_GSD.shape
    dtype, on_input = x_GSD.dtype, moves.config.expert.weight_on == "input"
    dispatch_GSE, combine_GSE = choice_GSKE.sum(axis=2), weight_GSKE.sum(axis=2)
    x_GESD = jnp.broadcast_to(x_GSD[:, None], (G, moves.config.num_experts, S, D))
    if on_input:
        x_GESD = (combine_GSE.swapaxes(1, 2)[..., None] * x_GESD).astype(dtype)
    keep_GESD = None
    if moves.keep_GSKD is not None:
        keep_GESD = jnp.einsum("GSKE,GSKD->GESD", choice_GSKE, moves.keep_GSKD.astype(dtype))
    y_GESD = _answers(x_GESD, keep_GESD, moves)
    factor_GSE = dispatch_GSE.astype(wide(dtype)) if on_input else combine_GSE
    return jnp.einsum("GSE,GESD->GSD", factor_GSE, y_GESD).astype(dtype)


def _tokens_in_slots(
    x_GSD: Array, choice_GSKE: Array, weight_GSKE: Array, slot_GSKC: Array, moves: Moves
) -> Float[Array, "G S D"]:
    """Every expert answers the tokens in its slots."""
    dtype, on_input = x_GSD.dtype, moves.config.expert.weight_on == "input"
    dispatch_GSEC = jnp.einsum("GSKE,GSKC->GSEC", choice_GSKE, slot_GSKC)
    combine_GSEC = jnp.einsum("GSKE,GSKC->GSEC", weight_GSKE, slot_GSKC.astype(weight_GSKE.dtype))
    if on_input:
        x_GECD = jnp.einsum("GSEC,GSD->GECD", combine_GSEC, x_GSD.astype(combine_GSEC.dtype)).astype(dtype)
    else:
        x_GECD = jnp.einsum("GSEC,GSD->GECD", dispatch_GSEC, x_GSD)
    keep_GECD = None
    if moves.keep_GSKD is not None:
        keep_GECD = jnp.einsum("GSKE,GSKC,GSKD->GECD", choice_GSKE, slot_GSKC, moves.keep_GSKD.astype(dtype))
    y_GECD = _answers(x_GECD, keep_GECD, moves)
    factor_GSEC = dispatch_GSEC.astype(wide(dtype)) if on_input else combine_GSEC
    return jnp.einsum("GSEC,GECD->GSD", factor_GSEC, y_GECD).astype(dtype)


def _answers(x_GECD: Float[Array, "G E C D"], keep_GECD: Array | None, moves: Moves) -> Float[Array, "G E C D"]:
    """The experts' answers, with dropout, in fp32 or wider."""
    G, E, C, D = x_GECD.shape
    y_ERD = moves.apply(x_GECD.swapaxes(0, 1).reshape(E, G * C, D), None)
    y_GECD = y_ERD.reshape(E, G, C, D).swapaxes(0, 1).astype(wide(x_GECD.dtype))
    if keep_GECD is not None:
        return apply_keep(y_GECD, keep_GECD > 0, moves.config.expert.dropout)
    return moves.dropout(y_GECD)


def with_identity(dispatch: Callable) -> Callable:
    """The dispatcher for a layer whose last experts return their input, or answer nothing: tokens are moved to the
    others alone.
    """

    def both(x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves) -> Float[Array, "G S D"]:
        config, expert_GSK = moves.config, routing.expert_GSK
        E = config.num_networks
        same_GSK = expert_GSK >= E
        others = Slots(jnp.where(same_GSK, moves.capacity, slots.slot_GSK), jnp.where(same_GSK, 0, slots.weight_GSK))
        inside = replace(config, num_experts=E, identity_experts=0, identity_answer="input", router=RouterConfig())
        to_others = routing._replace(expert_GSK=jnp.where(same_GSK, 0, expert_GSK))
        y_GSD = dispatch(x_GSD, to_others, others, moves._replace(config=inside))
        if config.identity_answer == "nothing":
            return y_GSD
        kept_GSK = same_GSK & (slots.slot_GSK < moves.capacity)
        weight_GS1 = jnp.where(kept_GSK, slots.weight_GSK, 0).sum(axis=-1, keepdims=True)
        compute = weight_GS1.dtype
        return (y_GSD.astype(compute) + weight_GS1 * x_GSD.astype(compute)).astype(x_GSD.dtype)

    return both


def single_answers(
    dispatch: Callable, x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S K D"]:
    """What each choice's expert answers before it is weighted, by the layer's own dispatcher; 0 where it was dropped.

    The dispatcher runs once for every k, as if that were each token's only choice. Without dropout.
    """
    alone = moves._replace(config=replace(moves.config, top_k=1), dropout_key=None, keep_GSKD=None)
    kept_GSK = slots.slot_GSK < moves.capacity
    on_input = moves.config.expert.weight_on == "input"
    weight_GSK = slots.weight_GSK if on_input else kept_GSK.astype(slots.weight_GSK.dtype)

    def of_choice(choice: tuple[Array, Array, Array]) -> Array:
        expert_GS1, weight_GS1, kept_GS1 = (each[..., None] for each in choice)
        place_GS1 = queue_positions(expert_GS1, weight_GS1, moves.config.num_experts, "token", choice[2])
        place_GS1 = _without_queue(place_GS1, expert_GS1, moves.config)
        only = Slots(jnp.where(kept_GS1, place_GS1, moves.capacity), weight_GS1)
        return dispatch(x_GSD, routing._replace(expert_GSK=expert_GS1, weight_GSK=weight_GS1), only, alone)

    of_each_k = [jnp.moveaxis(each, -1, 0) for each in (routing.expert_GSK, weight_GSK, kept_GSK)]
    return jnp.moveaxis(jax.lax.map(of_choice, tuple(of_each_k)), 0, 2)
