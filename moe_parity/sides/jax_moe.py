"""Our side with every intermediate value kept: the model's own modules called one after the other, layer by layer.

The arithmetic is the modules'; only the order in which they are called stands here a second time, unscanned, and that is
checked: the tapped answer must be that of the model's own call (a stage of its own in every report).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.attention.masks import visible_positions
from jax_moe.attention.rope import rotations
from jax_moe.config.models import DecoderConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.dims import Array, Float, Int
from jax_moe.dispatch import merge_groups, round_weights
from jax_moe.experts import Experts, expert_ffn
from jax_moe.models.block import Block
from jax_moe.models.decoder import Decoder, layer_windows
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.routing import expert_scores
from jax_moe.soft_moe import SoftMoE, soft_weights
from moe_parity.stages import KINDS, Place

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
        taps["shared"] = layer.shared_answer(x_GSD, mask_GS)
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
    model.check_tokens(tokens_BT)  # before int32 makes another token of a large number
    config, tokens = model.config, jnp.asarray(tokens_BT)
    ends = nnx.split(_Ends(model))
    x_BTD, turns = _decoder_start(*ends, tokens)
    trace = {Place("embedding"): x_BTD}
    stacks, windows = {"A": nnx.split(model.blocks), "M": nnx.split(model.moe)}, layer_windows(config)
    if config.dense_layers:
        stacks["D"] = nnx.split(model.dense)
    number = {"M": 0, "D": 0}
    for i in range(config.num_layers):
        letter = "D" if i in config.dense_layers else "M"
        graphs, params = zip(stacks["A"], stacks[letter], strict=True)
        taps = _decoder_layer(graphs, config, params, x_BTD, turns, windows, replay_LBTK, i, number[letter])
        number[letter] += 1
        trace |= {Place(kind, i): taps[kind] for kind in in_order(taps) if kind != "balance_loss"}
        x_BTD = taps["residual"]
    normed_BTD, logits_BTV = _decoder_end(*ends, x_BTD)
    return trace | {Place("final_norm"): normed_BTD, Place("logits"): logits_BTV}


class _Ends(Decoder):
    """A decoder without its layers: what is left of its call, and one program for all decoders of one contract."""

    def __init__(self, model: Decoder):
        self.config, self.embedding, self.final_norm = model.config, model.embedding, model.final_norm
        if not model.config.tied_embeddings:
            self.head = model.head


@partial(jax.jit, static_argnums=0)
def _decoder_start(graphdef: Any, params: Any, tokens_BT: Array) -> tuple[Array, Any]:
    model: _Ends = nnx.merge(graphdef, params)
    x_BTD = model.embed(tokens_BT)
    position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return x_BTD, rotations(position_BT, model.config.rope, model.config.head_dim, x_BTD.dtype)


@partial(jax.jit, static_argnums=0)
def _decoder_end(graphdef: Any, params: Any, x_BTD: Array) -> tuple[Array, Array]:
    model: _Ends = nnx.merge(graphdef, params)
    return model.final_norm(x_BTD), model.logits(x_BTD)


@partial(jax.jit, static_argnums=(0, 1))
def _decoder_layer(
    graphs: Any, config: DecoderConfig, params: Any, x_BTD: Array, turns: Any, windows: Array | None, replay_LBTK: Array | None,
    i: Any, n: Any,
) -> Taps:
    """Layer i, whose FFN is the n-th of its form; compiled once a form."""
    block, ffn = (nth(graph, stack, at) for graph, stack, at in zip(graphs, params, (i, n), strict=True))
    contract: Any = _Contract(config)
    add, dense = (partial(method, contract) for method in (Decoder.add, Decoder.dense_answer))
    position_T = jnp.arange(x_BTD.shape[1])
    normed_BTD = block.attention_norm(x_BTD)
    window = None if windows is None else windows[i]
    attended_BTD = block.attention(normed_BTD, turns, visible_positions(position_T, position_T.size, window, None))
    x_BTD = add(x_BTD, attended_BTD)
    ffn_BTD = block.ffn_norm(x_BTD)
    taps = {"attention_norm": normed_BTD, "attention": attended_BTD, "ffn_norm": ffn_BTD}
    if isinstance(ffn, Experts):
        inside = {"combined": dense(ffn_BTD, ffn)}
    else:
        inside = tap_mixture(ffn, ffn_BTD, None if replay_LBTK is None else replay_LBTK[n])
    return taps | inside | {"residual": add(x_BTD, inside["combined"])}


class _Contract(NamedTuple):
    """What `Decoder.add` and `Decoder.dense_answer` read of a decoder."""

    config: Any


def tap_makemoe(model: MakeMoE, tokens_BT: Int[Any, "B T"], replay_LBTK: Replay = None) -> dict[Place, Array]:
    """A makeMoE model's values in the order of computation."""
    model.check_tokens(tokens_BT)
    tokens = jnp.asarray(tokens_BT)
    x_BTD = model.token_embedding(tokens) + model.position_embedding(jnp.arange(tokens.shape[1]))
    trace = {Place("embedding"): x_BTD}
    graphdef, params = nnx.split(model.blocks)
    for i in range(model.config.num_layers):
        taps = _makemoe_layer(graphdef, params, x_BTD, replay_LBTK, i)
        trace |= {Place(kind, i): taps[kind] for kind in in_order(taps)}
        x_BTD = taps["residual"]
    trace[Place("final_norm")] = model.final_norm(x_BTD)
    return trace | {Place("logits"): model.head(trace[Place("final_norm")])}


@partial(jax.jit, static_argnums=0)
def _makemoe_layer(graphdef: Any, params: Any, x_BTD: Array, replay_LBTK: Array | None, i: Any) -> Taps:
    block: Block = nth(graphdef, params, i)
    normed_BTD = block.attention_norm(x_BTD).astype(x_BTD.dtype)
    attended_BTD = block.attention(normed_BTD)
    x_BTD = x_BTD + attended_BTD
    ffn_BTD = block.moe_norm(x_BTD).astype(x_BTD.dtype)
    taps = {"attention_norm": normed_BTD, "attention": attended_BTD, "ffn_norm": ffn_BTD}
    assert isinstance(block.moe, MoE)
    inside = tap_mixture(block.moe, ffn_BTD, None if replay_LBTK is None else replay_LBTK[i])
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


def nth(graphdef: Any, params: Any, i: Any) -> Any:
    """Layer `i` of a stack."""
    return nnx.merge(graphdef, jax.tree.map(lambda value: value[i], params))
