"""A user's own mapping table: where each tensor of a PyTorch module is in a JAX one, and what turns one into the other.

Numpy only. A table may say it as it likes: our path; (our path, transform); an `Entry`; a list of those where one of
theirs becomes several of ours; None for a buffer that ours does not have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """Where one of their tensors is in ours, and how it gets there."""

    ours: str  # our path: "dense.kernel"
    transform: Transform = np.asarray  # their array -> ours
    place: int | None = None  # it is ours[place]: theirs are stacked in ours


def stacked(ours: str, place: int, transform: Transform = np.asarray) -> Entry:
    """Theirs is number `place` of those that ours stacks along its first dim (layers, experts)."""
    return Entry(ours, transform, place)


def transpose(array: np.ndarray) -> np.ndarray:
    """The last two dims exchanged: torch.nn.Linear's [out, in] and a kernel [in, out]."""
    return np.swapaxes(array, -1, -2)


def permute(*order: int) -> Transform:
    """Dims in this order: `permute(2, 3, 1, 0)` is a torch convolution as flax has it."""
    return lambda array: np.transpose(array, order)


def reshape(*shape: int) -> Transform:
    """As `array.reshape(shape)`."""
    return lambda array: array.reshape(shape)


def split(index: int, count: int, axis: int = 0) -> Transform:
    """The part number `index` of `count` equal ones: q, k and v out of a fused projection."""
    return lambda array: np.split(array, count, axis)[index]


def then(*transforms: Transform) -> Transform:
    """One transform after the other."""

    def run(array: np.ndarray) -> np.ndarray:
        for transform in transforms:
            array = transform(array)
        return array

    return run


def entries_of(value: Any) -> list[Entry]:
    """A table's right side in the one form."""
    if value is None:
        return []
    if isinstance(value, Entry):
        return [value]
    if isinstance(value, str):
        return [Entry(value)]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and callable(value[1]):
        return [Entry(value[0], value[1])]
    if isinstance(value, tuple | list):
        return [entry for one in value for entry in entries_of(one)]
    raise ValueError(f"mapping: {value!r} must be a path, (path, transform), an Entry, a list of those, or None")


def check_names(table: Mapping[str, list[Entry]], theirs: set[str], trained: set[str], ours: set[str]) -> None:
    """Raises ValueError with every name of either side that has no partner, and every name that does not exist."""
    reached = [(entry.ours, entry.place) for entries in table.values() for entry in entries]
    paths = {path for path, _ in reached}
    places = {path: [place for one, place in reached if one == path] for path in sorted(paths)}
    complaints = {
        "theirs that are not mapped": sorted(theirs - table.keys()),
        "theirs that do not exist": sorted(table.keys() - theirs),
        "parameters of theirs that are mapped to None": sorted(name for name in trained & table.keys() if not table[name]),
        "ours that nothing maps to": sorted(ours - paths),
        "ours that do not exist": sorted(paths - ours),
        "ours that are mapped more than once": [path for path, found in places.items() if None in found and len(found) > 1],
        "ours whose places are not 0, 1, 2 ...": [
            path for path, found in places.items() if None not in found and sorted(found) != list(range(len(found)))  # type: ignore[type-var]
        ],
    }
    said = [f"{what}: {', '.join(names)}" for what, names in complaints.items() if names]
    if said:
        raise ValueError("mapping: must name every tensor of both sides once. " + "; ".join(said))


def moved(entry: Entry, array: np.ndarray, name: str) -> np.ndarray:
    """One of their tensors as ours. Raises ValueError where its transform cannot take it."""
    try:
        return np.ascontiguousarray(entry.transform(array))
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"mapping: {name} of shape {array.shape} cannot be turned into {entry.ours}: {error}") from None


def our_weights(
    table: Mapping[str, list[Entry]], state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Their tensors under our paths. Raises ValueError with every shape that does not fit."""
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
