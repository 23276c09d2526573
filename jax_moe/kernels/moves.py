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
    """The token of each place; zeros for an empty place."""
    return rows_at(x_SD, choice_P // place_SK.shape[1])


def _tokens_forward(x_SD: Array, choice_P: Array, place_SK: Array) -> tuple[Array, tuple]:
    return tokens_to_places(x_SD, choice_P, place_SK), (choice_P, place_SK)


def _tokens_backward(saved: tuple, g_PD: Array) -> tuple:
    choice_P, place_SK = saved
    return rows_at(g_PD, place_SK).sum(axis=1), *no_gradient((choice_P, place_SK))


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
