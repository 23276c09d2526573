"""Attention, one kind a file. `KINDS` is the one list that a decoder reaches them through.

A kind is a module of one layer, made as `Kind(contract, rngs=, kernel_init=, param_dtype=)`, with
- `shared(contract, positions, dtype)`: what all layers of one contract have in common in a call, computed once;
- `__call__(x_BTD, positions, shared, *, key=None, training=True, memory=None)` -> (y_BTD, cache): `positions` hold the
  mask of real tokens; with `memory`, the layers' common cache and this layer's place in it, the positions are written
  there and attend to what was there before;
- `empty_cache(contract, num_layers, batch_size, num_slots, dtype)`: the cache of that many layers, with nothing in it.
"""

from typing import Any

from jax_moe.attention.grouped import GroupedAttention
from jax_moe.attention.latent import LatentAttention
from jax_moe.attention.linear import LinearAttention
from jax_moe.attention.masks import visible_positions
from jax_moe.attention.multihead import Attention
from jax_moe.attention.positions import Positions
from jax_moe.attention.products import attention_by
from jax_moe.attention.rope import rotate, rotations
from jax_moe.config.attention import GroupedAttentionConfig, LayerAttention
from jax_moe.config.latent import LatentAttentionConfig
from jax_moe.config.linear import LinearAttentionConfig

__all__ = [
    "KINDS", "Attention", "GroupedAttention", "LatentAttention", "LinearAttention", "Positions", "attention_by",
    "kind_of", "rotate", "rotations", "visible_positions",
]

KINDS: dict[type[LayerAttention], Any] = {
    GroupedAttentionConfig: GroupedAttention, LatentAttentionConfig: LatentAttention,
    LinearAttentionConfig: LinearAttention,
}


def kind_of(contract: LayerAttention) -> Any:
    """The module of a contract. Raises ValueError for a kind that is not in the list."""
    if type(contract) not in KINDS:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"attention={type(contract).__name__}: must be one of {known} (jax_moe.attention.KINDS)")
    return KINDS[type(contract)]
