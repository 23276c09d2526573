"""A decoder with a memory: the prompt in one pass, then one token at a time against cached keys and values.

Texts end together: a shorter one begins later, at slot `start_B`, so that all write the same slot of the cache. A position
counts from the text's first token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.attention.grouped import Rotations
from jax_moe.attention.masks import visible_positions
from jax_moe.attention.rope import dynamic, rotations
from jax_moe.config.models import DecoderConfig
from jax_moe.config.moe import ExpertConfig
from jax_moe.dims import Array, DTypeLike, Float, Int, wide
from jax_moe.dispatch import Moves, merge_groups, round_weights
from jax_moe.experts import Weights, expert_ffn, take_experts
from jax_moe.kernels.chosen import are_few, chosen_dispatch
from jax_moe.models.decoder import Decoder, after_units, layer_units, layer_windows
from jax_moe.moe import MoE
from jax_moe.parameters import of_role


class Cache(NamedTuple):
    """What every layer remembers of every slot, in the weights' dtype."""

    key_LBUJA: Float[Array, "L B U J A"]
    value_LBUJA: Float[Array, "L B U J A"]


def prefill(
    model: Decoder, tokens_BT: Int[Array, "B T"], start_B: Int[Array, " B"], num_slots: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the last position, and a cache of `num_slots` with the first T filled."""
    slot_T = jnp.arange(tokens_BT.shape[1])
    x_BTD = model.embed(tokens_BT)
    turns = text_rotations(slot_T, start_B, num_slots, model.config, x_BTD.dtype)
    x_BTD, _, heads = model.layers(x_BTD, turns, slot_T >= start_B[:, None], keep_heads=True)
    assert heads is not None
    room = [(0, 0), (0, 0), (0, num_slots - tokens_BT.shape[1]), (0, 0), (0, 0)]
    return model.logits(x_BTD[:, -1:])[:, 0], Cache(*(jnp.pad(each, room) for each in heads))


def decode(
    model: Decoder, token_B: Int[Array, " B"], slot: Int[Array, ""], start_B: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the token that stands at `slot`, and the cache with it."""
    config, num_slots = model.config, cache.key_LBUJA.shape[2]
    x_BTD = model.embed(token_B[:, None])
    turns = text_rotations(slot[None], start_B, num_slots, config, x_BTD.dtype)
    mask_BU = jnp.arange(num_slots) >= start_B[:, None]
    windows_L = layer_windows(config)
    blocks = nnx.split(model.blocks)
    ffns = {"M": _mixtures(model), "D": _dense_layers(model)}

    def one_layer(letter: str, layer: Array, number: Array, x_BTD: Array, cache: Cache) -> tuple[Array, Cache]:
        block = nnx.merge(blocks[0], _at(blocks[1], layer))
        q_BTHA, k_BTJA, v_BTJA = block.attention.project(block.attention_norm(x_BTD), turns)
        place = [jnp.asarray(index, jnp.int32) for index in (layer, 0, slot, 0, 0)]
        news = (k_BTJA[None], v_BTJA[None])
        cache = Cache(*(jax.lax.dynamic_update_slice(old, new, place) for old, new in zip(cache, news, strict=True)))
        visible = visible_positions(slot[None], num_slots, None if windows_L is None else windows_L[layer], mask_BU)
        k_BUJA, v_BUJA = _at(cache, layer)
        x_BTD = model.add(x_BTD, block.attention.attend(q_BTHA, k_BUJA, v_BUJA, visible))
        return model.add(x_BTD, ffns[letter](block.ffn_norm(x_BTD), number)), cache

    before = dict.fromkeys("ADM", 0)
    for unit, count in layer_units(config):

        def one_unit(i: Array, carry: tuple, unit: str = unit, before: dict[str, int] = before) -> tuple:
            for place, letter in enumerate(unit):
                layer = before["A"] + i * len(unit) + place
                number = before[letter] + i * unit.count(letter) + unit[:place].count(letter)
                carry = one_layer(letter, layer, number, *carry)
            return carry

        x_BTD, cache = jax.lax.fori_loop(0, count, one_unit, (x_BTD, cache))
        before = after_units(before, unit, count)
    return model.logits(x_BTD)[:, 0], cache


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), tree)


def _dense_layers(model: Decoder) -> Callable[[Array, Array], Array] | None:
    """(x_BTD, which of the dense layers) -> y_BTD."""
    if not model.config.dense_layers:
        return None
    graph, weights = nnx.split(model.dense)
    return lambda x_BTD, number: model.dense_answer(x_BTD, nnx.merge(graph, _at(weights, number)))


def _mixtures(model: Decoder) -> Callable[[Array, Array], Array]:
    """(x_BTD, which of the mixtures) -> y_BTD; of few tokens only the chosen experts' weights are read.

    A layer's slice of the stacked experts would be a copy of them all, so the experts of all layers are numbered through.
    """
    graph, experts, others = nnx.split(model.moe, of_role("expert"), ...)
    through = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), experts)

    def answer(x_BTD: Array, number: Array) -> Array:
        config = model.config.moe
        if config.dispatcher != "auto" or not are_few(x_BTD.shape[0], config):
            return nnx.merge(graph, _at(experts, number), _at(others, number))(x_BTD, training=False)[0]
        mixture: MoE = nnx.merge(graph, through, _at(others, number))
        x_GSD, routing, slots, capacity, mask_GS = mixture.routing(x_BTD, training=False)
        weights = mixture.experts.weights()
        apply = experts_in_place(weights, number * config.num_experts, config.expert)
        moves = Moves(config=config, capacity=capacity, apply=apply, weights=weights)
        y_GSD = chosen_dispatch(x_GSD, routing, round_weights(slots, config, x_BTD.dtype), moves)
        if config.expert.shared_dim:
            y_GSD += mixture.shared_answer(x_GSD, mask_GS)
        return merge_groups(y_GSD, *x_BTD.shape[:2])

    return answer


def experts_in_place(weights: Weights, first: Int[Array, ""], config: ExpertConfig) -> Callable[[Array, Array], Array]:
    """(x_R1D, expert_R) -> y_R1D, each row with its own expert, number `first` + expert_R of the weights.

    On CPU one row after the other: a gather of [R, D, F] would write all that it reads and read it again.
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


def text_rotations(
    slot_T: Int[Array, " T"], start_B: Int[Array, " B"], num_slots: int, config: DecoderConfig, dtype: DTypeLike
) -> Rotations:
    """cos and sin of the slots' positions.

    "dynamic" frequencies are those of the longest text's length at the last of the slots, as in transformers' generate: a
    key keeps the turn it was cached with, and texts generated together stretch together.
    """
    position_BT = jnp.maximum(slot_T - start_B[:, None], 0)
    if config.rope.kind != "dynamic":
        return rotations(position_BT, config.rope, config.head_dim, jnp.dtype(dtype))
    table = np.stack([dynamic(config.rope, config.head_dim, length) for length in range(num_slots + 1)])
    frequency = jnp.asarray(table, wide(dtype))[slot_T[-1] + 1 - start_B.min()]
    half_BTA = position_BT[..., None].astype(wide(dtype)) * frequency
    angle_BTA = jnp.concatenate([half_BTA, half_BTA], axis=-1)
    return jnp.cos(angle_BTA).astype(dtype), jnp.sin(angle_BTA).astype(dtype)
