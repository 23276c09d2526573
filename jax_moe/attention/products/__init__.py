"""The two products of softmax attention, the ways to compute them, and the choice among these.

All have one signature and, but for rounding, one answer. `plain` holds all scores. `blocks` holds those of one block of
queries, so that memory grows with T and not with T * U; it runs on every device. `kernel` holds those of a tile, where
a kernel of the device covers what is asked.
"""

from collections.abc import Callable
from typing import Any, get_args

import jax

from jax_moe.attention.masks import Scope
from jax_moe.attention.products.blockwise import blocks
from jax_moe.attention.products.kernels import kernel, missing
from jax_moe.attention.products.plain import Softmax, plain
from jax_moe.config.checks import require
from jax_moe.config.products import Products
from jax_moe.dims import Array, Float
from jax_moe.sharding.inside import devices_of_positions, positions_split, positions_whole

__all__ = ["Softmax", "attend", "attention_by", "blocks", "chosen", "kernel", "plain"]

WAYS: dict[str, Callable] = {"plain": plain, "blocks": blocks, "kernel": kernel}
# Beyond so many pairs of query and key "auto" leaves `plain`: the scores of a head of one sequence then take 16 MiB in
# fp32, those of 32 heads 512 MiB, in every copy that a layer's backward pass holds.
LONG = 2048 * 2048
_chosen = jax.make_user_context("auto")  # part of the keys of jit's caches


def attention_by(name: str) -> Any:
    """A context in which attention computes its products in this way: auto, plain, blocks or kernel.

    Raises ValueError for an unknown name.
    """
    known = get_args(Products)
    require(name in known, "attention", name, f"one of {', '.join(known)}")
    return _chosen(name)


def attend(
    q_BTHA: Float[Array, "B T H A"], k_BUJA: Float[Array, "B U J A"], v_BUJM: Float[Array, "B U J M"], scope: Scope,
    softmax: Softmax,
) -> Float[Array, "B T H M"]:
    """What the queries find among the keys, computed in the way in use. Raises ValueError as `chosen`.

    Where devices share the positions, each has its own queries and all keys.
    """
    way = WAYS[chosen(q_BTHA, k_BUJA, v_BUJM, scope, softmax)]
    if devices_of_positions(q_BTHA.shape[1]) > 1:
        q_BTHA, k_BUJA, v_BUJM = positions_split(q_BTHA), positions_whole(k_BUJA), positions_whole(v_BUJM)
    return way(q_BTHA, k_BUJA, v_BUJM, scope, softmax)


def chosen(
    q_BTHA: Float[Array, "B T H A"], k_BUJA: Float[Array, "B U J A"], v_BUJM: Float[Array, "B U J M"], scope: Scope,
    softmax: Softmax,
) -> str:
    """The way in use: "plain" for a single query, as in a step of generation, or none, whatever is asked for.

    "auto" is "plain" up to `LONG` pairs, then "blocks", as no kernel has been timed yet; with dropout of the weights
    always "plain", which alone draws it. Raises ValueError for another way that cannot compute this.
    """
    name, (B, T) = _chosen.value, q_BTHA.shape[:2]
    if B == 0 or T <= 1:
        return "plain"
    if name == "auto":
        if T * scope.num_slots <= LONG or softmax.drops:
            return "plain"
        return "blocks"
    whole = name == "plain" or not softmax.drops
    require(whole, "attention", name, "plain or auto with dropout of attention's weights, which 'plain' alone draws")
    lacks = missing(q_BTHA, k_BUJA, v_BUJM, scope, softmax) if name == "kernel" else ""
    require(not lacks, "attention", name, f"auto, blocks or plain: the kernel does not cover {lacks}")
    return name
