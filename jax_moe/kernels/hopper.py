"""Products of rows in blocks with their experts' weights, on NVIDIA Hopper GPUs (Pallas, Mosaic GPU).

Every block of BLOCK rows belongs to one expert, so each tile of an answer is an ordinary matrix product and no edge is
ragged. One thread block a multiprocessor walks over all tiles: two warpgroups multiply (`wgmma`) while a third fetches
the next slices. Measured against other kernels in docs/performance.md. The structure is that of jax's own
`jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from jax_moe.dims import Array, DTypeLike, Float, Int
from jax_moe.kernels.devices import BLOCK
from jax_moe.kernels.moves import no_gradient

DEPTH = 64  # rows or columns of one step of a sum
PIECE = 64  # rows and columns of what is written at once
STEPS = 4  # slices in flight
WIDTH = 8  # tiles side by side before the next row of tiles, so that their operands are still in the L2 cache
WARPGROUPS = 2  # that multiply


def multiprocessors() -> int:
    """How many the GPU has; 2 where there is none, for the interpreter."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 2


@jax.custom_vjp
def block_product(
    x_PD: Float[Array, "P D"], weight_EDF: Float[Array, "E D F"], expert_I: Int[Array, " I"],
    first_E: Int[Array, " E"], blocks_E: Int[Array, " E"],
) -> Float[Array, "P F"]:
    """Each block of rows times its expert's weights; P = I * BLOCK.

    Expert e owns `blocks_E[e]` blocks, at least 1, from block `first_E[e]` on. Blocks after the last expert's must hold
    zeros. Sums are in fp32.
    """
    return _padded(rows_product, x_PD, weight_EDF, expert_I)[:, : weight_EDF.shape[2]]


def _forward(x_PD: Array, weight_EDF: Array, *blocks: Array) -> tuple[Array, tuple]:
    return block_product(x_PD, weight_EDF, *blocks), (x_PD, weight_EDF, *blocks)


def _backward(saved: tuple, g_PF: Array) -> tuple:
    x_PD, weight_EDF, expert_I, first_E, blocks_E = saved
    _, D, F = weight_EDF.shape
    g_x = _padded(partial(rows_product, transposed=True), g_PF, weight_EDF, expert_I)[:, :D]
    g_weight = _padded(weights_product, x_PD, g_PF, first_E, blocks_E)[:, :D, :F]
    return g_x, g_weight, *no_gradient((expert_I, first_E, blocks_E))


block_product.defvjp(_forward, _backward)


def _padded(product: Callable, x: Array, y: Array, *blocks: Array) -> Array:
    """The product of the operands with zeros up to whole tiles; E and P stay."""

    def whole(a: Array) -> Array:
        spare = [-size % BLOCK for size in a.shape[1:]]
        return jnp.pad(a, [(0, 0), *((0, each) for each in spare)]) if any(spare) else a

    return product(whole(x), whole(y), *blocks)


def rows_product(
    x_PK: Float[Array, "P K"], weight_E: Float[Array, "E _ _"], expert_I: Int[Array, " I"], transposed: bool = False
) -> Float[Array, "P N"]:
    """Each block times its expert's weights, [E, K, N], or [E, N, K] if they are transposed."""
    (P, K), N = x_PK.shape, weight_E.shape[1 if transposed else 2]
    tile_n = _tile_width(N)
    grid = (P // BLOCK, N // tile_n)
    weight_shape = (tile_n, DEPTH) if transposed else (DEPTH, tile_n)

    def pipeline(multiply: Callable, around: Callable) -> Any:
        specs = [
            _slices((BLOCK, DEPTH), lambda k: (0, k), x_PK.dtype),
            _slices(weight_shape, (lambda k: (0, k)) if transposed else (lambda k: (k, 0)), x_PK.dtype),
        ]
        return _pipeline(multiply, around, K // DEPTH, specs)

    def kernel(x: Any, weight: Any, expert: Any, y: Any) -> None:
        def tile(index: Array, columns: Any, write: Callable, allocations: Any) -> None:
            i, n = gpu.planar_snake(index, grid, 1, WIDTH)
            rows, across = pl.ds(i * BLOCK, BLOCK), pl.ds(n * tile_n, tile_n)
            own = weight.at[expert[i]]

            def multiply(_: Any, x_slice: Any, weight_slice: Any, total: Any) -> Any:
                part = weight_slice.at[columns].transpose((1, 0)) if transposed else weight_slice.at[:, columns]
                gpu.wgmma(total, x_slice, part)
                gpu.wgmma_wait(0)
                return total

            own = own.at[across, :] if transposed else own.at[:, across]
            run = pipeline(multiply, partial(write, target=y.at[rows, across].at[:, columns]))
            run(x.at[rows, :], own, allocations=allocations)

        allocations = pipeline(_nothing, _nothing).get_allocations(x, weight.at[0])
        _walk(grid[0] * grid[1], tile, allocations, tile_n, x_PK.dtype)

    return _launch(kernel, jax.ShapeDtypeStruct((P, N), x_PK.dtype))(x_PK, weight_E, expert_I)


def weights_product(
    x_PK: Float[Array, "P K"], g_PN: Float[Array, "P N"], first_E: Int[Array, " E"], blocks_E: Int[Array, " E"]
) -> Float[Array, "E K N"]:
    """x^T g over the blocks of each expert: the gradient of its weights."""
    (P, K), N, E = x_PK.shape, g_PN.shape[1], first_E.shape[0]
    tile_n, steps = _tile_width(N), BLOCK // DEPTH
    grid = (K // BLOCK, N // tile_n)

    def pipeline(multiply: Callable, around: Callable, first: Any, length: Any) -> Any:
        specs = [_slices((DEPTH, wide), lambda k: (first + k, 0), x_PK.dtype) for wide in (BLOCK, tile_n)]
        return _pipeline(multiply, around, length, specs)

    def kernel(x: Any, g: Any, first: Any, blocks: Any, weight: Any) -> None:
        def tile(index: Array, columns: Any, write: Callable, allocations: Any) -> None:
            e = index // (grid[0] * grid[1])
            m, n = gpu.planar_snake(index % (grid[0] * grid[1]), grid, 1, WIDTH)
            rows, across = pl.ds(m * BLOCK, BLOCK), pl.ds(n * tile_n, tile_n)

            def multiply(_: Any, x_slice: Any, g_slice: Any, total: Any) -> Any:
                gpu.wgmma(total, x_slice.transpose((1, 0)), g_slice.at[:, columns])
                gpu.wgmma_wait(0)
                return total

            around = partial(write, target=weight.at[e].at[rows, across].at[:, columns])
            run = pipeline(multiply, around, first[e] * steps, blocks[e] * steps)
            run(x.at[:, rows], g.at[:, across], allocations=allocations)

        allocations = pipeline(_nothing, _nothing, 0, P // DEPTH).get_allocations(x, g)
        _walk(E * grid[0] * grid[1], tile, allocations, tile_n, x_PK.dtype)

    out = jax.ShapeDtypeStruct((E, K, N), x_PK.dtype)
    return _launch(kernel, out)(x_PK, g_PN, first_E, blocks_E)


def _tile_width(N: int) -> int:
    """Columns of a tile; each warpgroup has half of them."""
    return 256 if N % 256 == 0 else 128


def _slices(shape: tuple[int, int], place: Callable, dtype: DTypeLike) -> Any:
    """How one operand's slices lie in shared memory."""
    return gpu.BlockSpec(shape, place, transforms=_layout(shape[1], dtype), memory_space=gpu.SMEM)


def _layout(columns: int, dtype: DTypeLike) -> tuple:
    size = jnp.dtype(dtype).itemsize
    swizzle = gpu.find_swizzle(columns * size * 8)
    return gpu.TilingTransform((8, swizzle // size)), gpu.SwizzleTransform(swizzle)


def _pipeline(multiply: Callable, around: Callable, steps: Any, specs: list) -> Any:
    """`multiply` for every step, while the third warpgroup fetches; `around` runs it and takes the sum."""
    return gpu.emit_pipeline_warp_specialized(
        multiply, grid=(steps,), in_specs=specs, compute_context=around, memory_registers=40, wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS, max_concurrent_steps=STEPS,
    )


def _walk(num_tiles: int, tile: Callable, allocations: Any, tile_n: int, dtype: DTypeLike) -> None:
    """`tile(index, columns, write, allocations)` for every tile of this multiprocessor.

    `columns` are this warpgroup's; `write(run, target)` runs a pipeline and stores its sum.
    """
    columns = tile_n // WARPGROUPS
    pieces = gpu.SMEM((WARPGROUPS, 2, PIECE, PIECE), dtype, transforms=_layout(PIECE, dtype))

    @partial(pl.run_scoped, allocations=allocations, pieces=pieces, collective_axes="warpgroup")
    def _(allocations: Any, pieces: Any) -> None:
        me = jax.lax.axis_index("warpgroup")

        def write(run: Callable, target: Any) -> None:
            @partial(pl.run_scoped, total=gpu.ACC((BLOCK, columns), jnp.float32))
            def _(total: Any) -> None:
                run(total)
                _store(total[...].astype(dtype), pieces.at[me], target)

        @gpu.nd_loop((num_tiles,), collective_axes="multiprocessor")
        def _(loop: Any) -> None:
            tile(loop.index[0], pl.ds(me * columns, columns), write, allocations)

    gpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(values: Array, pieces: Any, target: Any) -> None:
    """Writes the values through two pieces of shared memory in turn."""
    rows, columns = values.shape
    gpu.wait_smem_to_gmem(0, wait_read_only=True)
    corners = [(m, n) for m in range(0, rows, PIECE) for n in range(0, columns, PIECE)]
    for number, (m, n) in enumerate(corners):
        part = slice(m, m + PIECE), slice(n, n + PIECE)
        gpu.wait_smem_to_gmem(1, wait_read_only=True)  # the piece before this may still be on its way
        pieces[number % 2] = values[part]
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(pieces.at[number % 2], target.at[part])


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for a function that takes no part in what a pipeline allocates."""


def _launch(kernel: Callable, out: jax.ShapeDtypeStruct) -> Callable:
    return gpu.kernel(
        kernel, out_type=out, grid=(multiprocessors(),), grid_names=("multiprocessor",), num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )
