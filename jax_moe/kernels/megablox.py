"""Grouped products by the TPU kernels that jax ships (`jax.experimental.pallas.ops.tpu.megablox`, after MegaBlocks,
arXiv 2211.15841): rows sorted by expert, a tile of the grid for each block of rows and expert that meet.

XLA computes the weights' gradient of `jax.lax.ragged_dot` as E masked dense products; here it costs what the forward
product costs. Each of the three products has tiles of its own.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe.dims import Array, Float, Int

ROWS = 512  # of a tile
WIDTH = 1024  # the most columns of a tile, of both sides
LANES = 128  # the columns of a tile are a multiple of these


def grouped_product(
    x_RD: Float[Array, "R D"], weight_EDF: Float[Array, "E D F"], count_E: Int[Array, " E"], interpret: bool = False
) -> Float[Array, "R F"]:
    """Each expert's rows times its weights, in the dtype of the rows; zeros after the last expert's rows.

    `interpret` runs the kernels in Pallas' interpreter, on any device.
    """
    R = x_RD.shape[0]
    inside_R1 = (jnp.arange(R) < count_E.sum())[:, None]
    rows = jnp.where(inside_R1, x_RD, 0)  # what the kernels leave after the last expert's rows is undefined
    padded = jnp.pad(rows, ((0, -R % _rows(R)), (0, 0)))
    return jnp.where(inside_R1, _product(padded, weight_EDF, count_E, interpret)[:R], 0)


def _rows(R: int) -> int:
    return min(ROWS, -(-R // LANES) * LANES)


def tiles(R: int, inner: int, outer: int) -> tuple[int, int, int]:
    """Of a product of R rows: rows of a tile, and its columns of both sides."""
    wide = [min(WIDTH, -(-size // LANES) * LANES) for size in (inner, outer)]
    return _rows(R), wide[0], wide[1]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x_RD: Array, weight_EDF: Array, count_E: Array, interpret: bool) -> Array:
    return _by_rows(x_RD, weight_EDF, count_E, interpret)


def _by_rows(rows: Array, weights: Array, count_E: Array, interpret: bool, transposed: bool = False) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    D, F = weights.shape[1:][::-1] if transposed else weights.shape[1:]
    return gmm(
        rows, weights, count_E, preferred_element_type=rows.dtype, tiling=tiles(rows.shape[0], D, F),
        transpose_rhs=transposed, interpret=interpret,
    )


def _forward(x_RD: Array, weight_EDF: Array, count_E: Array, interpret: bool) -> tuple[Array, tuple[Array, ...]]:
    return _product(x_RD, weight_EDF, count_E, interpret), (x_RD, weight_EDF, count_E)


def _backward(interpret: bool, saved: tuple[Array, ...], g_RF: Array) -> tuple[Any, ...]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_RD, weight_EDF, count_E = saved
    by_x = _by_rows(g_RF, weight_EDF, count_E, interpret, transposed=True)
    by_weight = tgmm(
        x_RD.swapaxes(0, 1), g_RF, count_E, preferred_element_type=weight_EDF.dtype,
        tiling=tiles(x_RD.shape[0], *weight_EDF.shape[1:]), interpret=interpret,
    )
    return by_x, by_weight, None


_product.defvjp(_forward, _backward)
