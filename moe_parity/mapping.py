"""A user's own mapping: where each tensor of a PyTorch module stands in a JAX module, and how it is converted.

A mapping gives, for each PyTorch name: a JAX path; (path, transform); an `Entry`; a list of those if the tensor becomes
several JAX arrays; or None for a buffer that JAX does not have. `ours` is the JAX side, `theirs` the PyTorch side; both
are numpy arrays here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """Where a PyTorch tensor stands in the JAX module, and how it is converted."""

    ours: str  # the JAX path, such as "dense.kernel"
    transform: Transform = np.asarray  # PyTorch array -> JAX array
    place: int | None = None  # the index in the first dim of a JAX array that stacks several tensors


def stacked(ours: str, place: int, transform: Transform = np.asarray) -> Entry:
    """The tensor is number `place` of those that the JAX array stacks along its first dim (layers, experts)."""
    return Entry(ours, transform, place)


def transpose(array: np.ndarray) -> np.ndarray:
    """Exchanges the last two dims: torch.nn.Linear's [out, in] becomes a kernel [in, out]."""
    return np.swapaxes(array, -1, -2)


def permute(*order: int) -> Transform:
    """Reorders the dims: `permute(2, 3, 1, 0)` makes a flax kernel of the weight of a torch convolution."""
    return lambda array: np.transpose(array, order)


def reshape(*shape: int) -> Transform:
    """Calls `array.reshape(shape)`."""
    return lambda array: array.reshape(shape)


def split(index: int, count: int, axis: int = 0) -> Transform:
    """Part `index` of `count` equal parts: q, k or v of a fused projection."""
    return lambda array: np.split(array, count, axis)[index]


def then(*transforms: Transform) -> Transform:
    """Applies the transforms one after the other."""

    def run(array: np.ndarray) -> np.ndarray:
        for transform in transforms:
            array = transform(array)
        return array

    return run


def entries_of(value: Any) -> list[Entry]:
    """The entries of a mapping's value, in whichever form it is given."""
    if value is None:
        return []
    if isinstance(value, Entry):
        return [value]
    if isinstance(value, str):
        return [Entry(value)]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and callable(value[1]):
        return [Entry(value[0], value[1])]
    if isinstance(value, tuple | list):
        return [entry for part in value for entry in entries_of(part)]
    raise ValueError(f"mapping: {value!r} must be a path, (path, transform), an Entry, a list of those, or None")


def check_names(table: Mapping[str, list[Entry]], theirs: set[str], trained: set[str], ours: set[str]) -> None:
    """Raises ValueError that lists every name without a partner on either side, and every name that does not exist."""
    reached = [(entry.ours, entry.place) for entries in table.values() for entry in entries]
    paths = {path for path, _ in reached}
    places = {path: [place for other, place in reached if other == path] for path in sorted(paths)}
    complaints = {
        "PyTorch tensors that are not mapped": sorted(theirs - table.keys()),
        "PyTorch tensors that do not exist": sorted(table.keys() - theirs),
        "PyTorch parameters that are mapped to None": sorted(
            name for name in trained & table.keys() if not table[name]
        ),
        "JAX arrays that nothing maps to": sorted(ours - paths),
        "JAX arrays that do not exist": sorted(paths - ours),
        "JAX arrays that are mapped more than once": [
            path for path, found in places.items() if None in found and len(found) > 1
        ],
        "JAX arrays whose places are not 0, 1, 2 ...": [
            path for path, found in places.items() if None not in found and {*found} != {*range(len(found))}
        ],
    }
    said = [f"{what}: {', '.join(names)}" for what, names in complaints.items() if names]
    if said:
        raise ValueError("mapping: must name every tensor of both sides once. " + "; ".join(said))


def moved(entry: Entry, array: np.ndarray, name: str) -> np.ndarray:
    """A PyTorch tensor converted for JAX. Raises ValueError if the transform fails."""
    try:
        return np.ascontiguousarray(entry.transform(array))
    except (ValueError, IndexError, TypeError) as error:
        what = f"{name} of shape {array.shape}"
        raise ValueError(f"mapping: {what} cannot be turned into {entry.ours}: {error}") from None


def our_weights(
    table: Mapping[str, list[Entry]], state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The converted tensors by JAX path. Raises ValueError that lists every shape that does not fit."""
    pieces: dict[str, dict[int | None, np.ndarray]] = {}
    for name, array in state.items():
        for entry in table[name]:
            pieces.setdefault(entry.ours, {})[entry.place] = moved(entry, array, name)
    weights, wrong = {}, []
    for path, found in pieces.items():
        parts = [found[place] for place in sorted(found, key=lambda place: place or 0)]
        fits = len({part.shape for part in parts}) == 1
        weights[path] = parts[0] if None in found else np.stack(parts) if fits else np.zeros(0)
        if weights[path].shape != shapes[path]:
            made = weights[path].shape if fits else " and ".join(sorted({str(part.shape) for part in parts}))
            wrong.append(f"{path} would be {made}, must be {shapes[path]}")
    if wrong:
        raise ValueError("mapping: shapes do not fit. " + "; ".join(wrong))
    return weights
