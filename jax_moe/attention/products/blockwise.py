"""The queries in blocks, one after another: only the scores of one block exist at a time, forward and backward."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe.attention.masks import Scope
from jax_moe.attention.products.plain import Softmax, plain
from jax_moe.dims import Array, Float
from jax_moe.sharding.inside import devices_of_positions, positions_split

QUERIES = 256  # of a block


def blocks(
    q_BTHA: Float[Array, "B T H A"], k_BUJA: Float[Array, "B U J A"], v_BUJM: Float[Array, "B U J M"], scope: Scope,
    softmax: Softmax,
) -> Float[Array, "B T H M"]:
    """`plain` of every block against all keys; the backward pass computes a block's scores again.

    Where X devices share the positions, each takes blocks of its own queries, X times as short, at the same time.
    """
    (B, T, H, A), M = q_BTHA.shape, v_BUJM.shape[-1]
    X = devices_of_positions(T)
    if X == 1:
        return _in_turn(QUERIES, q_BTHA, k_BUJA, v_BUJM, scope, softmax)

    def part(q_BTHA: Array, slot_T: Array) -> Array:
        return _in_turn(-(-QUERIES // X), q_BTHA, k_BUJA, v_BUJM, scope._replace(slot_T=slot_T), softmax)

    q_XBTHA = positions_split(q_BTHA.reshape(B, X, T // X, H, A).swapaxes(0, 1), 0)
    y_XBTHM = positions_split(jax.vmap(part)(q_XBTHA, scope.slot_T.reshape(X, T // X)), 0)
    return y_XBTHM.swapaxes(0, 1).reshape(B, T, H, M)


def _in_turn(
    queries: int, q_BTHA: Array, k_BUJA: Array, v_BUJM: Array, scope: Scope, softmax: Softmax
) -> Float[Array, "B T H M"]:
    """Blocks of so many queries."""
    (B, T, H, A), M = q_BTHA.shape, v_BUJM.shape[-1]
    n = -(-T // queries)
    short = n * queries - T
    q_NBTHA = jnp.pad(q_BTHA, ((0, 0), (0, short), (0, 0), (0, 0))).reshape(B, n, queries, H, A).swapaxes(0, 1)
    slot_NT = jnp.pad(scope.slot_T, (0, short)).reshape(n, queries)
    rule = scope.num_slots, scope.window, scope.chunk, scope.causal, softmax.scale
    floats, integers = (q_NBTHA, k_BUJA, v_BUJM, softmax.sinks_H), (slot_NT, scope.mask_BU)
    return _mapped(rule, floats, integers).swapaxes(0, 1).reshape(B, n * queries, H, M)[:, :T]


def _each(rule: tuple, floats: tuple, integers: tuple) -> Array:
    q_NBTHA, k_BUJA, v_BUJM, sinks_H = floats
    slot_NT, mask_BU = integers
    num_slots, window, chunk, causal, scale = rule

    @jax.checkpoint
    def block(q_BTHA: Array, slot_T: Array) -> Array:
        scope = Scope(slot_T, num_slots, mask_BU, window, chunk, causal)
        return plain(q_BTHA, k_BUJA, v_BUJM, scope, Softmax(scale, sinks_H))

    return jax.lax.map(lambda each: block(*each), (q_NBTHA, slot_NT))


# A gradient of its own, so that a layer that is told to keep its matrix products (remat="dots") does not keep these.
_mapped = partial(jax.custom_vjp, nondiff_argnums=(0,))(_each)


def _forward(rule: tuple, floats: tuple, integers: tuple) -> tuple[Array, tuple]:
    return _mapped(rule, floats, integers), (floats, integers)


def _backward(rule: tuple, kept: tuple, g_NBTHM: Array) -> tuple[Any, None]:
    floats, integers = kept
    return jax.vjp(lambda *floats: _each(rule, floats, integers), *floats)[1](g_NBTHM), None


_mapped.defvjp(_forward, _backward)
