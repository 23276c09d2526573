"""Prefill and decode: the prompt in one pass, then one token at a time against the layers' caches.

Prompts are padded on the left, so that all sequences write the same slot of the cache: the first token of a sequence
is at slot `start_B`, and its positions count from there. Each attention kind defines its own cache.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_moe.attention import kind_of
from jax_moe.attention.positions import Positions
from jax_moe.config.attention import LayerAttention
from jax_moe.config.decoder import DecoderConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int
from jax_moe.models.decoder import Decoder


class Cache(NamedTuple):
    """The caches of all layers, for U slots."""

    kept: dict[str, Any]  # by stack of layers, each in the form of its attention kind
    mask_BU: Bool[Array, "B U"]  # False at padding


def empty_cache(config: DecoderConfig, start_B: Int[Array, " B"], num_slots: int, dtype: DTypeLike) -> Cache:
    """An empty cache of `num_slots` slots."""
    kept = {
        name: kind_of(contract).empty_cache(contract, len(layers), start_B.shape[0], num_slots, dtype)
        for name, (layers, contract) in config.stacks.items() if isinstance(contract, LayerAttention)
    }
    return Cache(kept, jnp.arange(num_slots) >= start_B[:, None])


def cache_bytes(config: DecoderConfig, batch_size: int, num_slots: int, dtype: DTypeLike) -> int:
    """The memory that a cache takes."""
    cache = jax.eval_shape(lambda: empty_cache(config, jnp.zeros(batch_size, jnp.int32), num_slots, dtype))
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(cache))


def prefill(
    model: Decoder, tokens_BT: Int[Array, "B T"], start_B: Int[Array, " B"], num_slots: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the last position, and a cache of `num_slots` with the first T filled."""
    x_BTD, T = model.embed(tokens_BT), tokens_BT.shape[1]
    cache = empty_cache(model.config, start_B, num_slots, x_BTD.dtype)
    x_BTD, kept, _ = model.layers(x_BTD, _positions(jnp.arange(T), start_B, cache.mask_BU[:, :T]), cache.kept)
    assert kept is not None
    return model.logits(x_BTD[:, -1:])[:, 0], cache._replace(kept=kept)


def decode(
    model: Decoder, token_B: Int[Array, " B"], slot: Int[Array, ""], start_B: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the token at `slot`, and the cache with that token added."""
    positions = _positions(slot[None], start_B, cache.mask_BU)
    x_BTD, kept, _ = model.layers(model.embed(token_B[:, None]), positions, cache.kept, in_place=True)
    assert kept is not None
    return model.logits(x_BTD)[:, 0], cache._replace(kept=kept)


def _positions(slot_T: Array, start_B: Array, mask_BU: Array) -> Positions:
    """Positions of the tokens at these slots, in sequences that begin at `start_B`."""
    first = start_B.min(initial=jnp.iinfo(start_B.dtype).max)  # an empty batch has a length, too
    position_BT, length = jnp.maximum(slot_T - start_B[:, None], 0), slot_T[-1] + 1 - first
    return Positions(position_BT, slot_T, mask_BU.shape[1], mask_BU, length)
