"""Our side with every intermediate value kept: the model's own walk, which hands out its stages when asked."""

from collections.abc import Sequence
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
from jax_moe.soft_moe import SoftMoE, soft_weights
from moe_parity.stages import KINDS, Place

Replay = Int[Array, "L B T K"] | None


def tap_model(model: Decoder | MakeMoE, tokens_BT: Int[Any, "B T"], replay_LBTK: Replay = None) -> dict[Place, Array]:
    """A language model's values, layer by layer. `experts` are its own choices; all else follows the replayed ones, if
    any.
    """
    model.check_tokens(tokens_BT)  # before int32 makes another token of a large number
    stages = _watched_model(*nnx.split(model), jnp.asarray(tokens_BT), replay_LBTK)
    before, after = (
        {Place(kind): stages.pop(kind) for kind in kinds} for kinds in (("embedding",), ("final_norm", "logits"))
    )
    num_layers = model.config.num_layers
    mixtures: Sequence[int] = range(num_layers)
    if isinstance(model, Decoder):
        mixtures = model.config.moe_layers
        del stages["balance_loss"]  # pooled over the layers, it is no layer's own
    found: dict[int, dict[str, Array]] = {i: {} for i in range(num_layers)}
    for kind in sorted(stages, key=KINDS.index):
        value = stages[kind]
        for row, i in enumerate(mixtures if value.shape[0] == len(mixtures) else found):
            found[i][kind] = value[row]
    layers = {Place(kind, i): value for i, taps in found.items() for kind, value in taps.items()}
    return before | layers | after


@partial(jax.jit, static_argnums=0)
def _watched_model(graphdef: Any, params: Any, tokens_BT: Array, replay_LBTK: Array | None) -> dict[str, Array]:
    output = nnx.merge(graphdef, params).run(tokens_BT, training=False, expert_LBTK=replay_LBTK, watch=True)
    return {**output.stages, "logits": output.logits_BTV}


def tap_moe(layer: MoE, x_BTD: Float[Any, "B T D"], replay_BTK: Array | None = None) -> dict[Place, Array]:
    """A mixture's values, on vectors."""
    taps = _watched_mixture(*nnx.split(layer), jnp.asarray(x_BTD), replay_BTK)
    return {Place(kind): taps[kind] for kind in sorted(taps, key=KINDS.index)}


@partial(jax.jit, static_argnums=0)
def _watched_mixture(graphdef: Any, params: Any, x_BTD: Array, replay_BTK: Array | None) -> dict[str, Array]:
    return nnx.merge(graphdef, params).run(x_BTD, training=False, expert_BTK=replay_BTK, watch=True).stages


def ranked_scores(logits: np.ndarray, config: MoEConfig, correction_bias_E: np.ndarray | None = None) -> np.ndarray:
    """What the experts are ranked by: the logits where scores rise with them alone, else scores with their
    correction.
    """
    if correction_bias_E is None:
        return logits
    with jax.enable_x64(True):
        return np.asarray(expert_scores(jnp.asarray(logits, jnp.float64), config.router)) + correction_bias_E


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
