"""Runs a language model over sequences of tokens and keeps what its mixtures hand out about routing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jax_moe.config.decoder import DecoderConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE


class Observed(NamedTuple):
    """The routing of N tokens in every mixture; L counts the mixtures."""

    token_N: np.ndarray
    start_N: np.ndarray  # True at the first token of a window: it sees no token before it
    expert_LNK: np.ndarray  # choices, best first
    weight_LNK: np.ndarray  # their weights before drops
    dropped_LNK: np.ndarray  # True where a choice got no slot
    entropy_L: np.ndarray  # mean entropy of a token's scores, in nats


def windows(sequences: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Each sequence cut into parts of `length` tokens, the last one shorter."""
    return [each[start : start + length] for each in sequences for start in range(0, len(each), length)]


def window_length(model: MakeMoE | Decoder) -> int:
    """The longest text that the model was made for."""
    return model.config.block_size if isinstance(model, MakeMoE) else model.config.max_positions


def mixtures(model: MakeMoE | Decoder) -> Sequence[MoEConfig]:
    """The contract of every mixture."""
    config = model.config
    return config.mixtures if isinstance(config, DecoderConfig) else [config.moe] * config.num_layers


def observe(model: MakeMoE | Decoder, sequences: Sequence[np.ndarray]) -> Observed:
    """Runs the model without noise on each window alone, so that drops are those of a batch of one window.

    Raises ValueError for a token outside the vocabulary.
    """
    graph, weights = nnx.split(model)
    parts = windows([np.asarray(each, np.int64) for each in sequences], window_length(model))
    for part in parts:
        model.check_tokens(part[None])

    def run(weights: Any, token_1T: jax.Array) -> tuple[jax.Array, ...]:
        output = nnx.merge(graph, weights).run(token_1T, training=False, watch=True)
        assert output.stages is not None  # all else that is watched is not used, and not computed
        slot_L1TK, weight_L1TK = output.stages["slots"], output.stages["weights"]
        return output.expert_LBTK[:, 0], weight_L1TK[:, 0], slot_L1TK[:, 0], output.stats.router_entropy

    compiled = jax.jit(run)
    found = [[np.asarray(each) for each in compiled(weights, part[None].astype(np.int32))] for part in parts]
    dropped = [slot_LTK == _capacities(model, slot_LTK.shape[1]) for _, _, slot_LTK, _ in found]
    share_W = np.asarray([len(part) for part in parts]) / sum(map(len, parts))
    return Observed(
        token_N=np.concatenate(parts),
        start_N=np.concatenate([np.arange(len(part)) == 0 for part in parts]),
        expert_LNK=np.concatenate([expert_LTK for expert_LTK, _, _, _ in found], axis=1),
        weight_LNK=np.concatenate([weight_LTK for _, weight_LTK, _, _ in found], axis=1).astype(np.float64),
        dropped_LNK=np.concatenate(dropped, axis=1),
        entropy_L=np.stack([entropy_L for _, _, _, entropy_L in found], axis=1).astype(np.float64) @ share_W,
    )


def _capacities(model: MakeMoE | Decoder, num_tokens: int) -> np.ndarray:
    """[L, 1, 1]: the slot of a dropped choice, in a batch of one sequence."""
    slots = [moe.expert_capacity(moe.group_size(1, num_tokens)) for moe in mixtures(model)]
    return np.asarray(slots)[:, None, None]
