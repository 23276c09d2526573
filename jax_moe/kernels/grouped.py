"""Dropless (or not) by sorting: rows grouped by expert, one loop over tiles of rows, with a backward of its own.

A tile gathers its tokens, meets its expert's weights and adds its weighted answers to the tokens', all while they are in
cache: no buffer of sorted rows is ever written. The backward walks the same tiles; it reuses the saved pre-activations and
gets the gradient of a choice's weight from the hidden units (w * (h W) = (w * h) W), so no answer is kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe.config.moe import ExpertConfig
from jax_moe.dims import Array, Bool, Float, wide
from jax_moe.dispatch import Moves, Slots
from jax_moe.dropout import apply_keep
from jax_moe.experts import Weights, hidden_units
from jax_moe.kernels.tiles import Tiles, plan_tiles, tile_sizes
from jax_moe.routing import Routing


class Plan(NamedTuple):
    """What is static: the contract of the experts and the tiles' sizes."""

    config: ExpertConfig
    sizes: tuple[int, ...]


def grouped_dispatch(x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves) -> Float[Array, "G S D"]:
    """Same answer as `einsum_dispatch`; work grows with the kept choices, not with E."""
    G, S, D = x_GSD.shape
    config = moves.config
    K, E = config.top_k, config.num_experts
    sizes = tile_sizes(G * S * K, E)
    tiles = plan_tiles(routing, slots, moves.capacity, E, sizes)
    keep_SKD = moves.keep((G * S, K, D))
    answer = grouped_experts(
        Plan(config.expert, sizes), x_GSD.reshape(-1, D), slots.weight_GSK.reshape(-1, K), dict(moves.weights), tiles, keep_SKD
    )
    return answer.reshape(G, S, D)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_experts(
    plan: Plan, x_SD: Float[Array, "S D"], weight_SK: Float[Array, "S K"], weights: dict[str, Array], tiles: Tiles,
    keep_SKD: Bool[Array, "S K D"] | None,
) -> Float[Array, "S D"]:
    """Each token's weighted sum of its experts' answers, in the tokens' dtype."""
    return _forward(plan, x_SD, weight_SK, weights, tiles, keep_SKD, save=False)[0]


def _forward(
    plan: Plan, x_SD: Array, weight_SK: Array, weights: Weights, tiles: Tiles, keep_SKD: Array | None, save: bool
) -> tuple[Array, Array]:
    (S, D), K = x_SD.shape, weight_SK.shape[1]
    compute, weight_R = wide(x_SD.dtype), weight_SK.reshape(-1)
    width = weights["up"].shape[-1] * (2 if plan.config.gated else 1)

    def step(rows: int, full: bool, expert: Array, first: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y_SD, pre_PF = carry
        choice = jax.lax.dynamic_slice_in_dim(tiles.choice_P, first, rows)
        own = _of_expert(weights, expert)
        factor = _rows(weight_R, choice)[:, None]
        pre = _enter(_rows(x_SD, choice // K), factor, own, plan.config)
        y = _leave(pre, None, own, plan.config).astype(compute)
        if keep_SKD is not None:
            y = apply_keep(y, _rows(keep_SKD.reshape(-1, D), choice), plan.config.dropout)
        if plan.config.weight_on == "output":
            y *= factor
        return y_SD.at[choice // K].add(y), _put(pre_PF, pre, first) if save else pre_PF

    places = tiles.choice_P.shape[0] if save else 0
    start = jnp.zeros((S, D), compute), jnp.zeros((places, width), x_SD.dtype)
    y_SD, pre_PF = _each_tile(plan, tiles, step, start)
    return y_SD.astype(x_SD.dtype), pre_PF


def _save(
    plan: Plan, x_SD: Array, weight_SK: Array, weights: Weights, tiles: Tiles, keep_SKD: Array | None
) -> tuple[Array, tuple]:
    y_SD, pre_PF = _forward(plan, x_SD, weight_SK, weights, tiles, keep_SKD, save=True)
    return y_SD, (x_SD, weight_SK, weights, tiles, keep_SKD, pre_PF)


def _backward(plan: Plan, saved: tuple, g_SD: Array) -> tuple:
    x_SD, weight_SK, weights, tiles, keep_SKD, pre_PF = saved
    (S, D), K = x_SD.shape, weight_SK.shape[1]
    on_input = plan.config.weight_on == "input"
    weight_R = weight_SK.reshape(-1)

    def step(rows: int, full: bool, expert: Array, first: Array, carry: tuple[Array, Array, dict]) -> tuple[Array, Array, dict]:
        g_x_SD, g_weight_R, gradients = carry
        choice = jax.lax.dynamic_slice_in_dim(tiles.choice_P, first, rows)
        own = _of_expert(weights, expert)
        g = _rows(g_SD, choice // K)
        if keep_SKD is not None:
            g = apply_keep(g, _rows(keep_SKD.reshape(-1, D), choice), plan.config.dropout)
        factor = _rows(weight_R, choice)[:, None]
        pre = jax.lax.dynamic_slice_in_dim(pre_PF, first, rows)
        # the values are not used: XLA leaves out the products that only they need
        _, pull_out = jax.vjp(lambda pre, f, own: _leave(pre, f, own, plan.config), pre, None if on_input else factor, own)
        g_pre, g_factor, g_own = pull_out(g)
        x = _rows(x_SD, choice // K)
        _, pull_in = jax.vjp(lambda x, f, own: _enter(x, f, own, plan.config), x, factor, own)
        g_x, g_in_factor, g_more = pull_in(g_pre)
        gradients = {
            name: _put_expert(total, g_own[name] + g_more[name], expert, add=full) for name, total in gradients.items()
        }
        g_factor = g_in_factor if on_input else g_factor
        return g_x_SD.at[choice // K].add(g_x.astype(g_x_SD.dtype)), g_weight_R.at[choice].set(g_factor[:, 0]), gradients

    totals = {name: jnp.zeros(w.shape, w.dtype) for name, w in weights.items()}
    start = jnp.zeros((S, D), wide(x_SD.dtype)), jnp.zeros_like(weight_R), totals
    g_x_SD, g_weight_R, gradients = _each_tile(plan, tiles, step, start)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (tiles, keep_SKD))
    return g_x_SD.astype(x_SD.dtype), g_weight_R.reshape(S, K), gradients, *no_gradient


grouped_experts.defvjp(_save, _backward)


def _each_tile(plan: Plan, tiles: Tiles, step: Callable, carry: Any) -> Any:
    """`step(rows, full, expert, first row, carry)` for all tiles, one loop a size; the first tiles of all experts come before
    any full one."""
    last = len(plan.sizes)
    for number, rows in enumerate((*plan.sizes, plan.sizes[-1])):

        def body(i: Array, carry: Any, rows: int = rows, full: bool = number == last) -> Any:
            return step(rows, full, tiles.expert_I[i], tiles.row_I[i], carry)

        carry = jax.lax.fori_loop(tiles.bound_N[number], tiles.bound_N[number + 1], body, carry)
    return carry


def _of_expert(weights: Weights, expert: Array) -> dict[str, Array]:
    return {name: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for name, w in weights.items()}


def _enter(x: Array, factor: Array, own: Weights, config: ExpertConfig) -> Array:
    """x W + b for gate and up side by side, in one product."""
    names = ("gate", "up") if config.gated else ("up",)
    if config.weight_on == "input":
        x = (x * factor).astype(x.dtype)
    pre = x @ jnp.concatenate([own[name].astype(x.dtype) for name in names], axis=1)
    return pre + jnp.concatenate([own[f"{name}_bias"].astype(x.dtype) for name in names]) if config.bias else pre


def _leave(pre: Array, factor: Array | None, own: Weights, config: ExpertConfig) -> Array:
    """(factor * hidden units) W + factor * b."""
    gate, up = jnp.split(pre[None], 2, axis=-1) if config.gated else (None, pre[None])
    hidden = hidden_units(up, gate, config)[0]
    if factor is not None:
        hidden = (hidden * factor).astype(pre.dtype)
    y = hidden @ own["down"].astype(pre.dtype)
    if not config.bias:
        return y
    bias = own["down_bias"].astype(pre.dtype)
    return y + (bias if factor is None else (bias * factor).astype(pre.dtype))


def _rows(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _put(x: Array, rows: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), first, axis=0)


def _put_expert(total: Array, own: Array, expert: Array, add: bool) -> Array:
    """The expert's gradient in its place; its first tile sets it, the others add."""
    if add:
        own += jax.lax.dynamic_index_in_dim(total, expert, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, own.astype(total.dtype), expert, axis=0)
