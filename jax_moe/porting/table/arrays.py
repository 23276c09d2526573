"""Tensors of files to our stacked arrays on their devices, and back, one tensor at a time."""

from collections.abc import Callable, Collection, Mapping
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_moe.porting.errors import PortError
from jax_moe.porting.table.plan import Piece, Plan, assemble, memory_order, put
from jax_moe.porting.tensors import Header, all_finite
from jax_moe.sharding import place as sharding

Fetch = Callable[[Any, tuple], np.ndarray]  # (array, index) to that part in host memory


def place_all(
    plan: Plan, headers: Mapping[str, Header], dtype: np.dtype | None, mesh: Mesh | None, allow_nonfinite: bool,
    where: str, kept: Collection[str] = (),
) -> dict[str, jax.Array]:
    """{our path: array on its devices}, assembled in host memory one at a time; `headers` have passed `check`.

    Arrays at the paths `kept` keep their dtype. Raises PortError naming every tensor with NaN, infinity or a number too
    large for `dtype`, and if jax would narrow a dtype.
    """
    by_path = {path: list(pieces) for path, pieces in groupby(plan.pieces, key=lambda piece: piece.ours)}
    dtypes = {path: dtype or headers[pieces[0].theirs].dtype for path, pieces in by_path.items()}
    for path in by_path.keys() & kept:  # the widest dtype among the layers
        dtypes[path] = max((headers[piece.theirs].dtype for piece in by_path[path]), key=lambda dtype: dtype.itemsize)
        if dtypes[path].kind == "i":  # numbers of experts: jax holds them in 32 bits
            dtypes[path] = np.dtype(np.int32)
    narrowed = [
        f"{path} is {dtype}" for path, dtype in dtypes.items() if jax.device_put(np.empty(0, dtype)).dtype != dtype
    ]
    if narrowed:
        raise PortError("jax would narrow the dtype (jax_enable_x64 is off)", mistyped=narrowed)
    placed: dict[str, jax.Array] = {}
    wrong: list[str] = []
    for path, pieces in by_path.items():

        def part(window: tuple[slice, ...], pieces: list[Piece] = pieces, dtype: Any = dtypes[path]) -> np.ndarray:
            value = _assembled(pieces, headers, window, dtype)
            if not (allow_nonfinite or all_finite(value)):
                wrong.extend(_not_finite(pieces, headers, dtype))
            return value

        array = sharding.place(part, plan.ours[path], mesh)
        if not wrong:
            placed[path] = array
    if wrong:
        raise PortError(where, wrong=list(dict.fromkeys(wrong)))
    return placed


def _assembled(
    pieces: list[Piece], headers: Mapping[str, Header], window: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """A window of our array, in the memory order of the file's tensors; jax transposes it on the way to the device."""
    order = memory_order(pieces[0])
    sizes = [span.stop - span.start for span in window]
    value = np.empty([sizes[axis] for axis in order], dtype).transpose(np.argsort(order))
    for piece in pieces:
        with np.errstate(over="ignore"):  # all_finite reports it
            assemble(piece, headers[piece.theirs].read(), value, window)
    return value


def _not_finite(pieces: list[Piece], headers: Mapping[str, Header], dtype: np.dtype) -> list[str]:
    found = []
    for name in dict.fromkeys(piece.theirs for piece in pieces):
        value = headers[name].read()
        if not all_finite(value):
            found.append(f"{name} holds NaN or infinity")
        elif np.dtype(value.dtype) != dtype:
            with np.errstate(over="ignore"):
                if not all_finite(value.astype(dtype)):
                    found.append(f"{name} is too large for {dtype}")
    return found


def theirs_from(plan: Plan, arrays: Mapping[str, Any], fetch: Fetch = sharding.fetch) -> dict[str, Header]:
    """{their name: header}, in row order; each header reads its tensor from our arrays on demand.

    `fetch` gives a part of an array in host memory. Raises PortError if our arrays that make up a tensor differ in
    dtype.
    """
    pieces: dict[str, list[Piece]] = {}
    for piece in plan.pieces:
        pieces.setdefault(piece.theirs, []).append(piece)
    dtypes = {name: {np.dtype(arrays[piece.ours].dtype) for piece in parts} for name, parts in pieces.items()}
    mixed = [
        f"{name} would hold {' and '.join(sorted(map(str, kinds)))}" for name, kinds in dtypes.items() if len(kinds) > 1
    ]
    if mixed:
        raise PortError(f"layout {plan.table.name}", mistyped=mixed)
    shapes = plan.their_shapes
    return {
        name: Header(shapes[name], dtype, _taker(plan, name, parts, arrays, fetch, dtype))
        for name, parts in pieces.items() for dtype in dtypes[name]
    }


def _taker(
    plan: Plan, name: str, pieces: list[Piece], arrays: Mapping[str, Any], fetch: Fetch, dtype: np.dtype
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        value = plan.blank(name, dtype)
        for piece in pieces:
            put(piece, fetch(arrays[piece.ours], piece.our_index), value)
        return value

    return read
