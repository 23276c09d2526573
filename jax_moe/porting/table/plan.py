"""Tables applied to numpy arrays: {their name: array} <-> {our path: array}, without any family or framework.

"Theirs" is the side of files and PyTorch modules, "ours" that of jax_moe.
"""

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_moe.config.parameters import Declared
from jax_moe.porting.errors import PortError, check_names
from jax_moe.porting.table.rows import Constant, Row, Table, dim, name_indices, part, stretch, words

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # ml_dtypes' own copying is slow


@dataclass(frozen=True)
class Piece:
    """A rectangle of an array of ours, and the rectangle of a tensor of theirs that holds the same numbers.

    theirs.reshape(split)[their_index].reshape(within).transpose(order) == ours[our_index]
    """

    theirs: str
    ours: str
    split: tuple[int, ...]
    their_index: tuple
    within: tuple[int, ...]
    our_index: tuple
    order: tuple[int, ...]

    def of_theirs(self, tensor: np.ndarray) -> np.ndarray:
        """The rectangle of their tensor, which is contiguous, as a view."""
        return tensor.reshape(self.split)[(*self.their_index, ...)].reshape(self.within)  # the ellipsis: also a scalar

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.within)


@dataclass(frozen=True)
class Plan:
    """A table applied to a module: all pieces, and the shapes on both sides."""

    table: Table
    ours: Mapping[str, Declared]
    pieces: tuple[Piece, ...]
    their_shapes: dict[str, tuple[int, ...]]
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def our_shapes(self) -> dict[str, tuple[int, ...]]:
        """{our path: shape}."""
        return {path: declared.shape for path, declared in self.ours.items()}

    @property
    def names(self) -> set[str]:
        """All of their names, masks included."""
        return {*self.their_shapes, *self.constants}

    @functools.cached_property
    def partial(self) -> frozenset[str]:
        """Their tensors that hold more than ours."""
        filled = dict.fromkeys(self.their_shapes, 0)
        for piece in self.pieces:
            filled[piece.theirs] += piece.size
        return frozenset(name for name, count in filled.items() if count != math.prod(self.their_shapes[name]))

    def blank(self, name: str, dtype: np.dtype) -> np.ndarray:
        """An array for one of their tensors, to be filled by its pieces; what is not ours is 0."""
        return (np.zeros if name in self.partial else np.empty)(self.their_shapes[name], dtype)

    def held(self, name: str) -> np.ndarray:
        """Which entries of one of their tensors are ours."""
        mask = np.zeros(self.their_shapes[name], bool)
        for piece in self.pieces:
            if piece.theirs == name:
                piece.of_theirs(mask)[...] = True
        return mask


def make_plan(table: Table, ours: Mapping[str, Declared]) -> Plan:
    """Applies the table to our weights. Raises PortError if no row covers a weight, or if rows cover only a part of it.

    Raises ValueError for a row whose dims differ from those of the parameter.
    """
    pieces: list[Piece] = []
    their_shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    filled = dict.fromkeys(ours, 0)
    beside = _sizes_beside(table, ours)
    for row in table.rows:
        for path, in_path in _matches(row.ours, ours):
            _check_dims(table, row, path, ours[path])
            local = _bind(row.our_dims, ours[path].shape)
            sizes |= local
            for piece, their_shape in _pieces(row, path, beside[row.theirs] | local, in_path, table.numbers):
                if their_shapes.setdefault(piece.theirs, their_shape) != their_shape:
                    raise PortError(f"layout {table.name}", wrong=[f"{piece.theirs} would have two shapes"])
                pieces.append(piece)
                filled[path] += piece.size
    uncovered = [path for path, declared in ours.items() if filled[path] != math.prod(declared.shape)]
    if uncovered:
        raise PortError(f"layout {table.name} has no names for", missing=uncovered)
    constants = {name: value for constant in table.constants for name, value in _constants(constant, sizes)}
    return Plan(table, dict(ours), tuple(pieces), their_shapes, constants)


def _sizes_beside(table: Table, ours: Mapping[str, Declared]) -> dict[str, dict[str, int]]:
    """{their name: sizes of the letters of all rows of that name}: a stretch is placed by the sizes of the others."""
    found: dict[str, dict[str, int]] = {row.theirs: {} for row in table.rows}
    for row in table.rows:
        if any(map(stretch, itertools.chain(*words(row.their_dims)))):
            for path, _ in _matches(row.ours, ours):
                found[row.theirs] |= _bind(row.our_dims, ours[path].shape)
    return found


def _check_dims(table: Table, row: Row, path: str, ours: Declared) -> None:
    said = tuple(dim(axis[0]) for axis in words(row.our_dims))
    if ours.dims is None and len(said) != len(ours.shape):
        raise PortError(f"layout {table.name}", wrong=[f"{path} has shape {ours.shape}, its row says {row.our_dims}"])
    if ours.dims is not None and said != ours.letters:
        where = f"layout {table.name}: dims of {path} in the row of {row.theirs}"
        raise ValueError(f"{where}={row.our_dims!r}: must be {ours.dims!r}, as the parameter says")


def their_names(plan: Plan, paths: Collection[str]) -> frozenset[str]:
    """Their names of the tensors that hold our arrays at these paths."""
    return frozenset(piece.theirs for piece in plan.pieces if piece.ours in paths)


def check(
    plan: Plan, state: Mapping[str, Any], where: str, dtypes: Mapping[str, np.dtype] | None = None,
    constants: bool = True,
) -> None:
    """Raises a PortError naming everything in which `state` (arrays, or their shapes and dtypes) differs from the plan.

    `dtypes` are by our path; with None the tensors that make up an array of ours need only agree.
    """
    expected = (
        plan.their_shapes if not constants else plan.their_shapes | {n: v.shape for n, v in plan.constants.items()}
    )
    wrong = [
        f"{name} must be {_says(plan, name)}"
        for name, value in plan.constants.items()
        if constants and name in state and state[name].shape == value.shape and not np.array_equal(state[name], value)
    ]
    check_names(where, state, expected, mistyped=_mistyped(plan, state, dtypes), wrong=wrong)


def to_ours(plan: Plan, state: Arrays) -> dict[str, np.ndarray]:
    """Our arrays from their tensors; `state` has passed `check`."""
    ours: dict[str, np.ndarray] = {}
    for piece in plan.pieces:
        theirs = state[piece.theirs]
        if piece.ours not in ours:
            ours[piece.ours] = np.empty(plan.ours[piece.ours].shape, theirs.dtype)
        assemble(piece, theirs, ours[piece.ours])
    return ours


def assemble(piece: Piece, theirs: np.ndarray, ours: np.ndarray, window: tuple[slice, ...] | None = None) -> None:
    """Copies the piece from their tensor into our array; with a window, `ours` is that part of our array."""
    value = piece.of_theirs(theirs).transpose(piece.order)
    if window is None:
        _copy(ours[(*piece.our_index, ...)], value)
        return
    spans = list(zip(piece.our_index, window, strict=True))
    if all(isinstance(index, slice) or span.start <= index < span.stop for index, span in spans):
        inside = tuple(index if isinstance(index, slice) else index - span.start for index, span in spans)
        _copy(ours[(*inside, ...)], value[tuple(span for index, span in spans if isinstance(index, slice))])


def take_apart(piece: Piece, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Copies the piece from our array into their tensor, which is contiguous."""
    put(piece, ours[(*piece.our_index, ...)], theirs)


def put(piece: Piece, part: np.ndarray, theirs: np.ndarray) -> None:
    """As `take_apart`, given `part`, which is ours[piece.our_index]."""
    _copy(piece.of_theirs(theirs), part.transpose(np.argsort(piece.order)))


def memory_order(piece: Piece) -> tuple[int, ...]:
    """The memory order of our axes, slowest first, in which the piece needs no transposition."""
    fixed = [axis for axis, index in enumerate(piece.our_index) if not isinstance(index, slice)]
    kept = [axis for axis, index in enumerate(piece.our_index) if isinstance(index, slice)]
    return (*fixed, *(kept[i] for i in np.argsort(piece.order)))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source; a transposition goes in strips of a cache line, 2.5 times as fast."""
    if target.dtype == source.dtype and target.itemsize in _BITS:
        target, source = target.view(_BITS[target.itemsize]), source.view(_BITS[target.itemsize])
    fastest = _fastest(target)
    if fastest == _fastest(source) or target.size < 1 << 14:
        target[...] = source
        return
    target, source = np.moveaxis(target, fastest, -1), np.moveaxis(source, fastest, -1)
    strip = max(1, 64 // target.itemsize)
    for start in range(0, target.shape[-1], strip):
        target[..., start : start + strip] = source[..., start : start + strip]


def _fastest(array: np.ndarray) -> int:
    """The axis whose neighbours are adjacent in memory."""
    return min(range(array.ndim), key=lambda axis: (array.shape[axis] < 2, array.strides[axis]), default=0)


def to_theirs(plan: Plan, ours: Arrays, constants: bool = True) -> dict[str, np.ndarray]:
    """Their tensors from our arrays, each a contiguous copy, in the table's order of names."""
    theirs: dict[str, np.ndarray] = {}
    for piece in plan.pieces:
        value = ours[piece.ours]
        if piece.theirs not in theirs:
            theirs[piece.theirs] = plan.blank(piece.theirs, value.dtype)
        elif theirs[piece.theirs].dtype != value.dtype:
            both = f"{piece.theirs} would hold {value.dtype} and {theirs[piece.theirs].dtype}"
            raise PortError(f"layout {plan.table.name}", mistyped=[both])
        take_apart(piece, value, theirs[piece.theirs])
    if constants and plan.constants:
        dtype = next(iter(theirs.values())).dtype
        theirs |= {name: value.astype(dtype) for name, value in plan.constants.items()}
    return theirs


def _matches(pattern: str, paths: Iterable[str]) -> Iterable[tuple[str, dict[str, int]]]:
    """Our paths that fit a pattern such as `experts.fcs.{i}.kernel`, each with the values of its indices."""
    parts = re.split(r"\{(\w+)\}", pattern)
    expression = "".join(re.escape(s) if i % 2 == 0 else f"(?P<{s}>\\d+)" for i, s in enumerate(parts))
    for path in paths:
        found = re.fullmatch(expression, path)
        if found:
            yield path, {letter: int(value) for letter, value in found.groupdict().items()}


def _bind(dims: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Sizes of the letters of our dims, which have no groups."""
    return {axis[0]: size for axis, size in zip(words(dims), shape, strict=True) if part(axis[0]) is None}


def _pieces(
    row: Row, path: str, sizes: dict[str, int], in_path: dict[str, int], numbers: Mapping[str, tuple[int, ...]]
) -> Iterable[tuple[Piece, tuple[int, ...]]]:
    ours = [axis[0] for axis in words(row.our_dims)]
    their_axes = words(row.their_dims)
    theirs = [word for axis in their_axes for word in axis]
    split = tuple(_size(word, sizes) for word in theirs)
    shape = tuple(math.prod(_size(word, sizes) for word in axis) for axis in their_axes)
    ranged = [letter for letter in name_indices(row.theirs) if letter not in in_path]
    kept = [word for word in ours if part(word) is None and word not in ranged]
    free = [letter for word in theirs for letter in _letters(word)]
    order = tuple(free.index(word) for word in kept)
    their_index = tuple(_index(word, sizes) for word in theirs)
    within = tuple(sizes[letter] for letter in free)
    for values in itertools.product(*(range(sizes[letter]) for letter in ranged)):
        index = dict(zip(ranged, values, strict=True))
        parts = ((word, part(word)) for word in ours)
        our_index = tuple(index.get(word, slice(None)) if of is None else of[0] for word, of in parts)
        printed = {letter: numbers[letter][i] if letter in numbers else i for letter, i in index.items()}
        yield Piece(row.theirs.format(**printed, **in_path), path, split, their_index, within, our_index, order), shape


def _size(word: str, sizes: dict[str, int]) -> int:
    """Of the axis that a word of theirs is, or is a part of."""
    fixed, stretched = part(word), stretch(word)
    if stretched is not None:
        return sum(math.prod(sizes[letter] for letter in letters) for letters in stretched[1])
    return sizes[word] if fixed is None else fixed[1]


def _letters(word: str) -> list[str]:
    """The letters of ours that a word of theirs holds."""
    stretched = stretch(word)
    if stretched is not None:
        return stretched[1][stretched[0]]
    return [word] if part(word) is None else []


def _index(word: str, sizes: dict[str, int]) -> int | slice:
    """What a word picks of its axis."""
    fixed, stretched = part(word), stretch(word)
    if stretched is not None:
        lengths = [math.prod(sizes[letter] for letter in letters) for letters in stretched[1]]
        start = sum(lengths[: stretched[0]])
        return slice(start, start + lengths[stretched[0]])
    return slice(None) if fixed is None else fixed[0]


def _constants(constant: Constant, sizes: dict[str, int]) -> Iterable[tuple[str, np.ndarray]]:
    letters = name_indices(constant.theirs)
    value = constant.value(*(sizes[axis[0]] for axis in words(constant.their_dims)))
    for values in itertools.product(*(range(sizes[letter]) for letter in letters)):
        yield constant.theirs.format(**dict(zip(letters, values, strict=True))), value


def _mistyped(plan: Plan, state: Mapping[str, Any], dtypes: Mapping[str, np.dtype] | None) -> list[str]:
    first: dict[str, np.dtype] = {}
    wrong: dict[str, str] = {}
    for piece in plan.pieces:
        if piece.theirs in state:
            found = state[piece.theirs].dtype
            expected = first.setdefault(piece.ours, found) if dtypes is None else dtypes[piece.ours]
            if found != expected:
                wrong[piece.theirs] = f"{piece.theirs} is {found}, must be {expected}"
    for name in plan.constants:
        if name in state and state[name].dtype.kind in "OSUVc" and state[name].dtype.name != "bfloat16":
            wrong[name] = f"{name} is {state[name].dtype}, must be a float"
    return list(wrong.values())


def _says(plan: Plan, name: str) -> str:
    for constant in plan.table.constants:
        expression = re.escape(constant.theirs)
        for letter in name_indices(constant.theirs):
            expression = expression.replace(re.escape("{" + letter + "}"), r"\d+")
        if re.fullmatch(expression, name):
            return (constant.value.__doc__ or "as the table says").strip().rstrip(".")
    return "as the table says"
