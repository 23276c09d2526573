"""Attention, one kind a file. `KINDS` is the one list that a decoder reaches them through.

A kind is a module of one layer, made as `Kind(contract, rngs=, kernel_init=, param_dtype=)`, with
- `shared(contract, positions, dtype)`: what all layers of one contract have in common in a call, computed once;
- `__call__(x_BTD, positions, shared, key=None, memory=None)` -> (y_BTD, cache): with `memory`, the layers' common cache and this
  layer's place in it, what these positions leave behind is written there and what stood there before is attended to;
- `empty_cache(contract, num_layers, batch_size, num_slots, dtype)`: the cache of that many layers, with nothing in it.
"""

from jax_moe.attention.grouped import GroupedAttention
from jax_moe.config.attention import GroupedAttentionConfig, LayerAttention

KINDS: dict[type[LayerAttention], type[GroupedAttention]] = {GroupedAttentionConfig: GroupedAttention}


def kind_of(contract: LayerAttention) -> type[GroupedAttention]:
    """The module of a contract. Raises ValueError for a kind that is not in the list."""
    if type(contract) not in KINDS:
        known = ", ".join(one.__name__ for one in KINDS)
        raise ValueError(f"attention={type(contract).__name__}: must be one of {known} (jax_moe.attention.KINDS)")
    return KINDS[type(contract)]
