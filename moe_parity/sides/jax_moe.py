"""Our side with every intermediate value kept: the model's own walk, which hands out its stages when asked."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.config.moe import MoEConfig
from jax_moe.dims import Array, Float, Int
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.routing import expert_scores
from jax_moe.soft_moe import SoftMoE
from moe_parity.batch import beside
from moe_parity.stages import KINDS, Place, places

Replay = Int[Array, "L B T K"] | None


def tap_model(model: Decoder | MakeMoE, tokens_BT: Int[Any, "B T"], replay_LBTK: Replay = None) -> dict[Place, Array]:
    """A language model's values, layer by layer. `experts` are its own choices; all else follows the replayed ones, if
    any.
    """
    model.check_tokens(tokens_BT)  # before int32 makes another token of a large number
    stages = _watched_model(*nnx.split(model), jnp.asarray(tokens_BT), replay_LBTK)
    if model.config.moe.balance.pooled == "over_layers":  # then it is no layer's own
        del stages["balance_loss"]
    return places(stages, model.config.num_layers, model.config.moe_layers)


@partial(jax.jit, static_argnums=0)
def _watched_model(graphdef: Any, params: Any, tokens_BT: Array, replay_LBTK: Array | None) -> dict[str, Array]:
    output = nnx.merge(graphdef, params).run(tokens_BT, training=False, expert_LBTK=replay_LBTK, watch=True)
    return {**output.stages, "logits": output.logits_BTV}


def tap_layer(layer: MoE | SoftMoE, x_BTD: Float[Any, "B T D"], replay_BTK: Array | None = None) -> dict[Place, Array]:
    """A layer's values, on vectors."""
    replay = {} if replay_BTK is None else {"expert_BTK": replay_BTK}
    taps = _watched_layer(*nnx.split(layer), jnp.asarray(x_BTD), replay)
    return {Place(kind): taps[kind] for kind in sorted(taps, key=KINDS.index)}


@partial(jax.jit, static_argnums=0)
def _watched_layer(graphdef: Any, params: Any, x_BTD: Array, replay: dict[str, Array]) -> dict[str, Array]:
    layer = nnx.merge(graphdef, params)
    return layer.run(x_BTD, training=False, watch=True, **replay, **beside_vectors(layer.config, x_BTD)).stages


def beside_vectors(config: Any, x_BTD: Array) -> dict[str, Array]:
    """What a layer reads beside its vectors, floats in their dtype."""
    drawn = {name: jnp.asarray(value) for name, value in beside(config, x_BTD.shape).items()}
    return {name: v.astype(x_BTD.dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for name, v in drawn.items()}


def ranked_scores(logits: np.ndarray, config: MoEConfig, correction_bias_E: np.ndarray | None = None) -> np.ndarray:
    """What the experts are ranked by: the logits where scores rise with them alone, else scores with their
    correction.
    """
    if correction_bias_E is None:
        return logits
    with jax.enable_x64(True):
        return np.asarray(expert_scores(jnp.asarray(logits, jnp.float64), config.router)) + correction_bias_E
