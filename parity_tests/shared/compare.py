"""Comparison that raises. Nothing here answers yes or no: a mismatch cannot be overlooked by forgetting an assert.

One error is used throughout: the worst entry's distance, and the norm of all distances, each over the scale of the
expected tensor; the larger of the two counts. The scale of a tensor is its own largest entry (its own norm), but at
least the share `small` of the largest in the same collection: a gradient of 1e-18 beside gradients of 1 is rounding,
not signal.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_parity.relative import largest, norm, relative_error

SMALL = 1e-3


class MismatchError(AssertionError):
    """Two sides differ; the message names the worst tensor, the entry, both values and the tolerance."""


@dataclass(frozen=True)
class Worst:
    """The worst error of a collection and where it stands."""

    error: float
    name: str
    index: tuple[int, ...]
    actual: float
    expected: float

    def __str__(self) -> str:
        at = f"{self.name}[{', '.join(map(str, self.index))}]"
        return f"error {self.error:.3g} at {at}: {self.actual!r}, expected {self.expected!r}"


def check_names(actual: Mapping[str, object], expected: Mapping[str, object], what: str) -> None:
    """Raises MismatchError unless both hold the same names; lists all that are on one side only."""
    missing, unexpected = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or unexpected:
        raise MismatchError(f"{what}: missing {missing}, unexpected {unexpected}")


def check_shapes(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], what: str) -> None:
    """Raises MismatchError unless names and shapes agree."""
    check_names(actual, expected, what)
    for name in expected:
        if actual[name].shape != expected[name].shape:
            raise MismatchError(f"{what}: {name} has shape {actual[name].shape}, expected {expected[name].shape}")


def check_exact(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], what: str) -> float:
    """0.0; raises MismatchError unless every entry is equal, bit for bit for floats (and dtypes too)."""
    check_shapes(actual, expected, what)
    for name in sorted(expected):
        a, b = actual[name], expected[name]
        if a.dtype.kind in "fV" or b.dtype.kind in "fV":
            if a.dtype != b.dtype:
                raise MismatchError(f"{what}: {name} has dtype {a.dtype}, expected {b.dtype}")
            bits = np.dtype(f"u{a.dtype.itemsize}")
            differs = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
        else:
            differs = a != b
        if differs.any():
            index = tuple(int(i) for i in np.argwhere(differs)[0])
            count = int(differs.sum())
            raise MismatchError(
                f"{what}: {name}{list(index)} is {a[index]}, expected {b[index]} ({count} of {a.size} entries differ)"
            )
    return 0.0


def worst_error(
    actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], what: str, small: float = SMALL
) -> Worst:
    """The largest relative error over all tensors; raises MismatchError for names, shapes or numbers not finite."""
    check_shapes(actual, expected, what)
    wide = {
        name: (np.asarray(actual[name], np.float64), np.asarray(expected[name], np.float64))
        for name in sorted(expected)
    }
    top = max((largest(b) for _, b in wide.values()), default=0.0)
    worst = Worst(0.0, "nothing", (), 0.0, 0.0)
    for name, (a, b) in wide.items():
        for side, x in (("actual", a), ("expected", b)):
            if not np.isfinite(x).all():
                index = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
                raise MismatchError(f"{what}: {name}{list(index)} of the {side} side is {x[index]}")
        if a.size == 0:
            continue
        distance = np.abs(a - b)
        index = tuple(int(i) for i in np.unravel_index(distance.argmax(), distance.shape))
        error = max(relative_error(a, b, size, small * top) for size in (largest, norm))
        if error > worst.error:
            worst = Worst(error, name, index, float(a[index]), float(b[index]))
    return worst


def check_close(
    actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float, what: str,
    small: float = SMALL,
) -> float:
    """The measured worst error; raises MismatchError if it is above the tolerance."""
    worst = worst_error(actual, expected, what, small)
    if not worst.error <= tolerance:
        raise MismatchError(f"{what}: {worst} (tolerance {tolerance:.3g})")
    return worst.error
