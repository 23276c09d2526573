"""Rows sorted by expert, dropless or not: a loop over tiles of rows, with a backward of its own.

Each tile gathers its tokens, applies its expert and adds the weighted answers to the tokens' sums, all while they are
in cache: no buffer of sorted rows is ever written. The backward walks the same tiles. It reuses the saved
pre-activations, and gets the gradient of a choice's weight from the hidden units (w * (h W) = (w * h) W), so no answer
has to be saved.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_moe.config.moe import ExpertConfig
from jax_moe.dims import Array, Bool, Float, Int, wide
from jax_moe.dispatch import Moves, Slots
from jax_moe.dropout import apply_keep
from jax_moe.experts import Weights, answer, hidden_units
from jax_moe.kernels.moves import no_gradient, rows_at
from jax_moe.kernels.tiles import Tiles, plan_tiles, tile_sizes
from jax_moe.routing import Routing


class Plan(NamedTuple):
    """The static arguments: the contract of the experts and the sizes of the tiles."""

    config: ExpertConfig
    sizes: tuple[int, ...]


class Inputs(NamedTuple):
    """The arguments of the forward, saved for the backward."""

    x_SD: Float[Array, "S D"]
    weight_SK: Float[Array, "S K"]
    weights: Weights  # of all experts
    tiles: Tiles
    keep_SKD: Bool[Array, "S K D"] | None  # dropout mask


class Tile(NamedTuple):
    """One tile, read from the inputs."""

    full: bool  # not its expert's first
    expert: Int[Array, ""]
    first: Int[Array, ""]  # its first row
    choice_R: Int[Array, " r"]  # the choice in each row; S * K in a spare row, which reads zeros and writes nothing
    token_R: Int[Array, " r"]
    factor_R1: Float[Array, "r 1"]  # the choices' weights
    own: Weights  # its expert's


class Gradients(NamedTuple):
    """What the backward accumulates over the tiles."""

    x_SD: Float[Array, "S D"]
    weight_R: Float[Array, " R"]  # of the choices in flat order
    weights: dict[str, Array]


def grouped_dispatch(
    x_GSD: Float[Array, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Array, "G S D"]:
    """Same answer as `einsum_dispatch`; work grows with the kept choices, not with E."""
    G, S, D = x_GSD.shape
    config = moves.config
    K, E = config.top_k, config.num_experts
    sizes = tile_sizes(G * S * K, E)
    tiles = plan_tiles(routing, slots, moves.capacity, E, sizes)
    tiles = tiles._replace(expert_I=tiles.expert_I + moves.first_expert)
    keep_SKD = moves.keep((G * S, K, D))
    x_SD, weight_SK = x_GSD.reshape(-1, D), slots.weight_GSK.reshape(-1, K)
    y_SD = grouped_experts(Plan(config.expert, sizes), x_SD, weight_SK, dict(moves.weights), tiles, keep_SKD)
    return y_SD.reshape(G, S, D)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_experts(
    plan: Plan, x_SD: Float[Array, "S D"], weight_SK: Float[Array, "S K"], weights: dict[str, Array], tiles: Tiles,
    keep_SKD: Bool[Array, "S K D"] | None,
) -> Float[Array, "S D"]:
    """Each token's weighted sum of its experts' answers, in the tokens' dtype."""
    return _forward(plan, Inputs(x_SD, weight_SK, weights, tiles, keep_SKD), save=False)[0]


def _forward(plan: Plan, inputs: Inputs, save: bool) -> tuple[Array, Array]:
    """The answers and, if `save`, the pre-activations of all rows."""
    x_SD, config, compute = inputs.x_SD, plan.config, wide(inputs.x_SD.dtype)

    def step(tile: Tile, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y_SD, pre_PF = carry
        pre_RF = _enter(rows_at(x_SD, tile.token_R), tile.factor_R1, tile.own, config)
        y_RD = _leave(pre_RF, None, tile.own, config).astype(compute)
        y_RD = _drop_out(y_RD, tile, inputs, config)
        if config.weight_on == "output":
            y_RD *= tile.factor_R1
        return y_SD.at[tile.token_R].add(y_RD), _put(pre_PF, pre_RF, tile.first) if save else pre_PF

    rows = inputs.tiles.choice_P.shape[0] if save else 0
    width = inputs.weights["up"].shape[-1] * (2 if config.gated else 1)
    start = jnp.zeros(x_SD.shape, compute), jnp.zeros((rows, width), x_SD.dtype)
    y_SD, pre_PF = _each_tile(plan, inputs, step, start)
    return y_SD.astype(x_SD.dtype), pre_PF


def _save(plan: Plan, *arguments: Any) -> tuple[Array, tuple[Inputs, Array]]:
    inputs = Inputs(*arguments)
    y_SD, pre_PF = _forward(plan, inputs, save=True)
    return y_SD, (inputs, pre_PF)


def _backward(plan: Plan, saved: tuple[Inputs, Array], g_SD: Array) -> tuple:
    """The gradients of all arguments of `grouped_experts` except the plan."""
    inputs, pre_PF = saved

    def step(tile: Tile, sums: Gradients) -> Gradients:
        g_RD = _drop_out(rows_at(g_SD, tile.token_R), tile, inputs, plan.config)
        pre_RF = jax.lax.dynamic_slice_in_dim(pre_PF, tile.first, tile.choice_R.shape[0])
        x_RD = rows_at(inputs.x_SD, tile.token_R)
        g_x_RD, g_factor_R1, g_own = _tile_gradients(g_RD, x_RD, pre_RF, tile, plan.config)
        return Gradients(
            sums.x_SD.at[tile.token_R].add(g_x_RD.astype(sums.x_SD.dtype)),
            sums.weight_R.at[tile.choice_R].set(g_factor_R1[:, 0]),
            {name: _put_expert(total, g_own[name], tile.expert, add=tile.full) for name, total in sums.weights.items()},
        )

    x_SD, weight_SK, weights = inputs[:3]
    zeros = {name: jnp.zeros(w.shape, w.dtype) for name, w in weights.items()}
    start = Gradients(jnp.zeros(x_SD.shape, wide(x_SD.dtype)), jnp.zeros_like(weight_SK.reshape(-1)), zeros)
    sums = _each_tile(plan, inputs, step, start)
    integers = no_gradient((inputs.tiles, inputs.keep_SKD))
    return sums.x_SD.astype(x_SD.dtype), sums.weight_R.reshape(weight_SK.shape), sums.weights, *integers


def _tile_gradients(
    g_RD: Array, x_RD: Array, pre_RF: Array, tile: Tile, config: ExpertConfig
) -> tuple[Array, Array, dict[str, Array]]:
    """Gradients of a tile's tokens, of its choices' weights and of its expert, from the gradient of its answers."""
    on_input = config.weight_on == "input"
    leave, enter = partial(_leave, config=config), partial(_enter, config=config)
    # the values are not used: XLA leaves out the products that only they need
    _, pull_leave = jax.vjp(leave, pre_RF, None if on_input else tile.factor_R1, tile.own)
    g_pre_RF, g_leave_factor, g_leave = pull_leave(g_RD)
    _, pull_enter = jax.vjp(enter, x_RD, tile.factor_R1, tile.own)
    g_x_RD, g_enter_factor, g_enter = pull_enter(g_pre_RF)
    g_own = {name: g_leave[name] + g_enter[name] for name in tile.own}
    return g_x_RD, g_enter_factor if on_input else g_leave_factor, g_own


grouped_experts.defvjp(_save, _backward)


def _each_tile(plan: Plan, inputs: Inputs, step: Callable[[Tile, Any], Any], carry: Any) -> Any:
    """`step(tile, carry)` over all tiles, in a loop for each size; all first tiles come before any full tile."""
    tiles, last = inputs.tiles, len(plan.sizes)
    for number, rows in enumerate((*plan.sizes, plan.sizes[-1])):

        def body(i: Array, carry: Any, rows: int = rows, full: bool = number == last) -> Any:
            return step(_read_tile(inputs, tiles.expert_I[i], tiles.row_I[i], rows, full), carry)

        carry = jax.lax.fori_loop(tiles.bound_N[number], tiles.bound_N[number + 1], body, carry)
    return carry


def _read_tile(inputs: Inputs, expert: Array, first: Array, rows: int, full: bool) -> Tile:
    choice_R = jax.lax.dynamic_slice_in_dim(inputs.tiles.choice_P, first, rows)
    own = {name: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for name, w in inputs.weights.items()}
    factor_R1 = rows_at(inputs.weight_SK.reshape(-1), choice_R)[:, None]
    return Tile(full, expert, first, choice_R, choice_R // inputs.weight_SK.shape[1], factor_R1, own)


def _drop_out(rows_RD: Array, tile: Tile, inputs: Inputs, config: ExpertConfig) -> Array:
    """Answers, or their gradients, under the dropout mask of their choices."""
    if inputs.keep_SKD is None:
        return rows_RD
    keep_RD = inputs.keep_SKD.reshape(-1, rows_RD.shape[1])
    return apply_keep(rows_RD, rows_at(keep_RD, tile.choice_R), config.dropout)


def _enter(x_RD: Array, factor_R1: Array, own: Weights, config: ExpertConfig) -> Array:
    """x W + b for gate and up side by side, in one product; x is weighted first where weights act on the input."""
    names = ("gate", "up") if config.gated else ("up",)
    if config.weight_on == "input":
        x_RD = (x_RD * factor_R1).astype(x_RD.dtype)
    pre_RF = x_RD @ jnp.concatenate([own[name].astype(x_RD.dtype) for name in names], axis=1)
    if not config.bias:
        return pre_RF
    return pre_RF + jnp.concatenate([own[f"{name}_bias"].astype(x_RD.dtype) for name in names])


def _leave(pre_RF: Array, factor_R1: Array | None, own: Weights, config: ExpertConfig) -> Array:
    """(factor * hidden units) W + factor * b; no factor is a factor of 1. A norm of answers comes before the factor."""
    gate, up = jnp.split(pre_RF[None], 2, axis=-1) if config.gated else (None, pre_RF[None])
    hidden_RF = hidden_units(up, gate, config)[0]
    if config.answer_norm != "none":
        y_RD = hidden_RF @ own["down"].astype(pre_RF.dtype)
        y_RD = y_RD + own["down_bias"].astype(pre_RF.dtype) if config.bias else y_RD
        y_RD = answer(y_RD[None], {"answer_scale": own["answer_scale"][None]}, config)[0]
        return y_RD if factor_R1 is None else (y_RD * factor_R1).astype(pre_RF.dtype)
    if factor_R1 is not None:
        hidden_RF = (hidden_RF * factor_R1).astype(pre_RF.dtype)
    y_RD = hidden_RF @ own["down"].astype(pre_RF.dtype)
    if not config.bias:
        return y_RD
    bias_D = own["down_bias"].astype(pre_RF.dtype)
    return y_RD + (bias_D if factor_R1 is None else (bias_D * factor_R1).astype(pre_RF.dtype))


def _put(x: Array, rows: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), first, axis=0)


def _put_expert(total: Array, own: Array, expert: Array, add: bool) -> Array:
    """The expert's gradient put into `total`: its first tile sets it, later tiles add to it."""
    if add:
        own += jax.lax.dynamic_index_in_dim(total, expert, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(total, own.astype(total.dtype), expert, axis=0)
