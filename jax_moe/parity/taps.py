"""Our side with every intermediate value kept: the model's own modules called one after the other, layer by layer.

The arithmetic is the modules'; only the order in which they are called stands here a second time, unscanned, and that is
checked: the tapped answer must be that of the model's own call (a stage of its own in every report).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.block import Block
from jax_moe.config import MoEConfig
from jax_moe.dims import Array, Float, Int
from jax_moe.dispatch import merge_groups, round_weights
from jax_moe.experts import Experts, expert_ffn
from jax_moe.grouped_attention import visible_positions
from jax_moe.models.decoder import Decoder, layer_windows
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.parity.stages import KINDS, Place
from jax_moe.rope import rotations
from jax_moe.routing import expert_scores
from jax_moe.soft_moe import SoftMoE, soft_weights

Taps = dict[str, Array]
Replay = Int[Array, "L B T K"] | None


def tap_mixture(layer: MoE, x_BTD: Float[Array, "B T D"], replay_BTK: Int[Array, "B T K"] | None = None) -> Taps:
    """Everything inside a mixture. `experts` are its own choices; all else follows the replayed ones where there are any."""
    B, T = x_BTD.shape[:2]
    own = layer.routing(x_BTD)[1]
    x_GSD, routing, slots, capacity, mask_GS = layer.routing(x_BTD, expert_BTK=replay_BTK)
    y_BTD, stats = layer(x_BTD, training=False, expert_BTK=replay_BTK)
    weight_GSK = round_weights(slots._replace(weight_GSK=routing.weight_GSK), layer.config, x_BTD.dtype).weight_GSK
    kept_GSK = slots.slot_GSK < capacity
    answers = expert_answers(layer, x_GSD, routing.expert_GSK, weight_GSK) * kept_GSK[..., None]
    taps = {
        "router_logits": routing.logits_GSE, "experts": own.expert_GSK, "weights": weight_GSK, "slots": slots.slot_GSK,
        "expert_outputs": answers,
    }
    if layer.config.expert.shared_dim:
        taps["shared"] = layer._shared_answer(x_GSD, mask_GS)
    return {kind: merge_groups(value, B, T) for kind, value in taps.items()} | {
        "combined": y_BTD, "balance_loss": stats.load_balance_loss
    }


def expert_answers(
    layer: MoE, x_GSD: Float[Array, "G S D"], expert_GSK: Int[Array, "G S K"], weight_GSK: Float[Array, "G S K"]
) -> Float[Array, "G S K D"]:
    """What every chosen expert answers, before it is weighted: all experts on all tokens, by the experts' own function."""
    config, D = layer.config, x_GSD.shape[-1]
    weights, E = layer.experts.weights(), config.num_experts
    answers = []
    for k in range(config.top_k):
        x_RD = x_GSD.reshape(-1, D)
        if config.expert.weight_on == "input":
            x_RD = (x_RD * weight_GSK[..., k].reshape(-1, 1)).astype(x_RD.dtype)
        if k == 0 or config.expert.weight_on == "input":  # else the same for every k
            y_ERD = expert_ffn(jnp.broadcast_to(x_RD, (E, *x_RD.shape)), weights, config.expert)
        index_1R1 = expert_GSK[..., k].reshape(1, -1, 1)
        answers.append(jnp.take_along_axis(y_ERD, index_1R1, axis=0)[0].reshape(x_GSD.shape))
    return jnp.stack(answers, axis=2)


def ranked_scores(logits: np.ndarray, config: MoEConfig, correction_bias_E: np.ndarray | None = None) -> np.ndarray:
    """What the experts are ranked by: the logits where scores rise with them alone, else scores with their correction."""
    if correction_bias_E is None:
        return logits
    with jax.enable_x64(True):
        return np.asarray(expert_scores(jnp.asarray(logits, jnp.float64), config.router)) + correction_bias_E


def tap_decoder(model: Decoder, tokens_BT: Int[Any, "B T"], replay_LBTK: Replay = None) -> dict[Place, Array]:
    """A decoder's values in the order of computation; L counts the layers with a mixture."""
    config, tokens = model.config, jnp.asarray(tokens_BT)
    model.check_tokens(tokens)
    x_BTD = model.embed(tokens)
    trace = {Place("embedding"): x_BTD}
    position_BT = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    turns = rotations(position_BT, config.rope, config.head_dim, x_BTD.dtype)
    windows, number = layer_windows(config), {"M": 0, "D": 0}
    for i in range(config.num_layers):
        letter = "D" if i in config.dense_layers else "M"
        n = number[letter]
        block, ffn = nth(model.blocks, i), nth(model.dense if letter == "D" else model.moe, n)
        number[letter] += 1
        replay = replay_LBTK[n] if letter == "M" and replay_LBTK is not None else None
        taps = _decoder_layer(model, block, ffn, x_BTD, turns, None if windows is None else windows[i], replay)
        trace |= {Place(kind, i): taps[kind] for kind in in_order(taps) if kind != "balance_loss"}
        x_BTD = taps["residual"]
    trace[Place("final_norm")] = model.final_norm(x_BTD)
    return trace | {Place("logits"): model.logits(x_BTD)}


def _decoder_layer(
    model: Decoder, block: Any, ffn: MoE | Experts, x_BTD: Array, turns: Any, window: Array | None, replay: Array | None
) -> Taps:
    """One layer, compiled once for all layers of its form."""
    graphdef, params = nnx.split((block, ffn))
    return _compiled_layer(graphdef, _Settings(model), params, x_BTD, turns, window, replay)


class _Settings:
    """The part of a decoder's call that is its contract; equal for models that are alike, so that a program serves them all."""

    def __init__(self, model: Decoder):
        self.config = model.config
        self.add: Callable = partial(Decoder.add, self)  # type: ignore[arg-type]
        self.dense_answer: Callable = partial(Decoder.dense_answer, self)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Settings) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config)


@partial(jax.jit, static_argnums=(0, 1))
def _compiled_layer(
    graphdef: Any, model: _Settings, params: Any, x_BTD: Array, turns: Any, window: Array | None, replay: Array | None
) -> Taps:
    block, ffn = nnx.merge(graphdef, params)
    position_T = jnp.arange(x_BTD.shape[1])
    normed_BTD = block.attention_norm(x_BTD)
    attended_BTD = block.attention(normed_BTD, turns, visible_positions(position_T, position_T.size, window, None))
    x_BTD = model.add(x_BTD, attended_BTD)
    ffn_BTD = block.ffn_norm(x_BTD)
    taps = {"attention_norm": normed_BTD, "attention": attended_BTD, "ffn_norm": ffn_BTD}
    inside = {"combined": model.dense_answer(ffn_BTD, ffn)} if isinstance(ffn, Experts) else tap_mixture(ffn, ffn_BTD, replay)
    return taps | inside | {"residual": model.add(x_BTD, inside["combined"])}


def tap_makemoe(model: MakeMoE, tokens_BT: Int[Any, "B T"], replay_LBTK: Replay = None) -> dict[Place, Array]:
    """A makeMoE model's values in the order of computation."""
    tokens = jnp.asarray(tokens_BT)
    model.check_tokens(tokens)
    x_BTD = model.token_embedding(tokens) + model.position_embedding(jnp.arange(tokens.shape[1]))
    trace = {Place("embedding"): x_BTD}
    for i in range(model.config.num_layers):
        graphdef, params = nnx.split(nth(model.blocks, i))
        taps = _compiled_block(graphdef, params, x_BTD, None if replay_LBTK is None else replay_LBTK[i])
        trace |= {Place(kind, i): taps[kind] for kind in in_order(taps)}
        x_BTD = taps["residual"]
    trace[Place("final_norm")] = model.final_norm(x_BTD)
    return trace | {Place("logits"): model.head(trace[Place("final_norm")])}


@partial(jax.jit, static_argnums=0)
def _compiled_block(graphdef: Any, params: Any, x_BTD: Array, replay: Array | None) -> Taps:
    block: Block = nnx.merge(graphdef, params)
    normed_BTD = block.attention_norm(x_BTD).astype(x_BTD.dtype)
    attended_BTD = block.attention(normed_BTD)
    x_BTD = x_BTD + attended_BTD
    ffn_BTD = block.moe_norm(x_BTD).astype(x_BTD.dtype)
    taps = {"attention_norm": normed_BTD, "attention": attended_BTD, "ffn_norm": ffn_BTD}
    assert isinstance(block.moe, MoE)
    inside = tap_mixture(block.moe, ffn_BTD, replay)
    return taps | inside | {"residual": x_BTD + inside["combined"]}


def tap_moe(layer: MoE, x_BTD: Float[Any, "B T D"], replay_BTK: Array | None = None) -> dict[Place, Array]:
    """A mixture's values, on vectors."""
    taps = _compiled_mixture(*nnx.split(layer), jnp.asarray(x_BTD), replay_BTK)
    return {Place(kind): taps[kind] for kind in in_order(taps)}


@partial(jax.jit, static_argnums=0)
def _compiled_mixture(graphdef: Any, params: Any, x_BTD: Array, replay_BTK: Array | None) -> Taps:
    return tap_mixture(nnx.merge(graphdef, params), x_BTD, replay_BTK)


def tap_soft_moe(layer: SoftMoE, x_BTD: Float[Any, "B T D"]) -> dict[Place, Array]:
    """Soft MoE's values: what every slot reads, what its expert answers, and how tokens read the slots."""
    x = jnp.asarray(x_BTD)
    dispatch_BTEC, combine_BTEC = soft_weights(x, layer.phi[...])
    x_EBCD = jnp.einsum("BTEC,BTD->EBCD", dispatch_BTEC, x.astype(dispatch_BTEC.dtype)).astype(x.dtype)
    graphdef, params = nnx.split(layer.experts)
    y_EBCD = jax.vmap(lambda params, x_BCD: nnx.merge(graphdef, params)(x_BCD))(params, x_EBCD)
    return {
        Place("weights", None, "dispatch"): dispatch_BTEC, Place("weights", None, "combine"): combine_BTEC,
        Place("slot_inputs"): x_EBCD, Place("expert_outputs"): y_EBCD, Place("combined"): layer(x),
    }


def in_order(taps: Taps) -> list[str]:
    """Kinds in the order of computation: what jit returns is sorted by name."""
    return sorted(taps, key=KINDS.index)


def nth(stack: nnx.Module, i: int) -> Any:
    """Layer `i` of a stack."""
    graphdef, params = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda value: value[i], params))
