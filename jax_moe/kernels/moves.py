"""Rows moved between tokens and places, forward and backward by gathers alone.

A place is a row of an expert's buffer. Each choice (the k-th of a token) owns at most one place, and each place belongs
to at most one choice. So the gradient of a gather is the gather in the other direction. XLA would use a scatter-add,
which is slow on CPU and TPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe.dims import Array, Float, Int, Shaped, wide
from jax_moe.dispatch import Moves, Slots
from jax_moe.dropout import apply_keep


def choice_of_place(place_R: Int[Array, " R"], num_places: int) -> Int[Array, " P"]:
    """The flat choice s * K + k that owns each place; R for an empty place. A choice at `num_places` owns no place."""
    R = place_R.shape[0]
    return jnp.full((num_places,), R, jnp.int32).at[place_R].set(jnp.arange(R, dtype=jnp.int32), mode="drop")


def rows_at(x: Shaped[Array, "X ..."], index: Int[Array, "..."]) -> Shaped[Array, "..."]:
    """The rows of `x` with these indices; zeros for an index beyond the last."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def tokens_to_places(
    x_SD: Float[Array, "S D"], choice_P: Int[Array, " P"], place_SK: Int[Array, "S K"]
) -> Float[Array, "P D"]:
    """The token of each place; zeros for an empty place.

    Backward, a token's K rows are added as they are read: nothing of size [S, K, D] is written.
    """
    return rows_at(x_SD, choice_P // place_SK.shape[1])


def _tokens_forward(x_SD: Array, choice_P: Array, place_SK: Array) -> tuple[Array, tuple]:
    return tokens_to_places(x_SD, choice_P, place_SK), (choice_P, place_SK)


def _tokens_backward(saved: tuple, g_PD: Array) -> tuple:
    choice_P, place_SK = saved
    rows = (rows_at(g_PD, place_S).astype(wide(g_PD.dtype)) for place_S in place_SK.T)
    return sum(rows).astype(g_PD.dtype), *no_gradient((choice_P, place_SK))  # type: ignore[union-attr]


@jax.custom_vjp
def places_to_choices(
    y_PD: Float[Array, "P D"], choice_P: Int[Array, " P"], place_SK: Int[Array, "S K"]
) -> Float[Array, "S K D"]:
    """The row of each choice's place; zeros for a choice that owns none."""
    return rows_at(y_PD, place_SK)


def _places_forward(y_PD: Array, choice_P: Array, place_SK: Array) -> tuple[Array, tuple]:
    return places_to_choices(y_PD, choice_P, place_SK), (choice_P, place_SK)


def _places_backward(saved: tuple, g_SKD: Array) -> tuple:
    choice_P, place_SK = saved
    return rows_at(g_SKD.reshape(-1, g_SKD.shape[-1]), choice_P), *no_gradient((choice_P, place_SK))


def no_gradient(tree: Any) -> Any:
    """The gradients of integers and masks: float0 arrays of the same shapes."""
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tree)


tokens_to_places.defvjp(_tokens_forward, _tokens_backward)
places_to_choices.defvjp(_places_forward, _places_backward)


def weight_of_place(x_PD: Float[Array, "P D"], slots: Slots, choice_P: Int[Array, " P"]) -> Float[Array, "P D"]:
    """Each row times the weight of the choice that owns it, for experts weighted on their input."""
    weight_P = rows_at(slots.weight_GSK.reshape(-1), choice_P)
    return (x_PD * weight_P[:, None]).astype(x_PD.dtype)


def combine_choices(y_GSKD: Float[Array, "G S K D"], slots: Slots, moves: Moves) -> Float[Array, "G S D"]:
    """The weighted sum of each token's answers, computed in fp32 or wider and returned in the input's dtype."""
    dtype, compute = y_GSKD.dtype, wide(y_GSKD.dtype)
    y_GSKD = y_GSKD.astype(compute)
    if moves.keep_GSKD is not None:
        y_GSKD = apply_keep(y_GSKD, moves.keep_GSKD, moves.config.expert.dropout)
    on_input = moves.config.expert.weight_on == "input"
    factor_GSK = (slots.slot_GSK < moves.capacity).astype(compute) if on_input else slots.weight_GSK
    return jnp.einsum("GSK,GSKD->GSD", factor_GSK, y_GSKD).astype(dtype)


@jax.custom_vjp
def weighted_sum(
    y_PD: Float[Array, "P D"], weight_SK: Float[Array, "S K"], choice_P: Int[Array, " P"], place_SK: Int[Array, "S K"]
) -> Float[Array, "S D"]:
    """Each token's answers times their weights, added in the weights' dtype as they are read.

    `places_to_choices` and `combine_choices` without a dropout mask, and without anything of size [S, K, D].
    """
    pairs = zip(weight_SK.T, place_SK.T, strict=True)
    answers = (weight_S[:, None] * rows_at(y_PD, place_S) for weight_S, place_S in pairs)
    return sum(answers).astype(y_PD.dtype)  # type: ignore[union-attr]


def _sum_forward(y_PD: Array, weight_SK: Array, choice_P: Array, place_SK: Array) -> tuple[Array, tuple]:
    return weighted_sum(y_PD, weight_SK, choice_P, place_SK), (y_PD, weight_SK, choice_P, place_SK)


def _sum_backward(saved: tuple, g_SD: Array) -> tuple:
    y_PD, weight_SK, choice_P, place_SK = saved
    g_PD = rows_at(g_SD, choice_P // place_SK.shape[1]).astype(weight_SK.dtype)
    g_y_PD = rows_at(weight_SK.reshape(-1), choice_P)[:, None] * g_PD
    g_weight_P = jnp.where(choice_P < weight_SK.size, (y_PD.astype(weight_SK.dtype) * g_PD).sum(axis=1), 0)
    return g_y_PD.astype(y_PD.dtype), rows_at(g_weight_P, place_SK), *no_gradient((choice_P, place_SK))


weighted_sum.defvjp(_sum_forward, _sum_backward)
