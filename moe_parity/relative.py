"""The relative error between two arrays, everywhere the same. Numpy only; sizes and differences are taken in fp64."""

from collections.abc import Callable

import numpy as np

Size = Callable[[np.ndarray], float]


def largest(values: np.ndarray) -> float:
    """The largest magnitude; 0 if there is no entry."""
    return float(np.abs(np.asarray(values, np.float64)).max(initial=0))


def norm(values: np.ndarray) -> float:
    """The Euclidean norm over all entries."""
    return float(np.linalg.norm(np.asarray(values, np.float64).reshape(-1)))


def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """ours - theirs, entry by entry."""
    return np.asarray(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))


def relative_error(ours: np.ndarray, theirs: np.ndarray, size: Size = largest, floor: float = 0.0) -> float:
    """size(ours - theirs) / max(size(theirs), floor).

    Infinite if a value is not finite, or if `theirs` is all zero and `ours` is not.
    """
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    distance, scale = size(difference(ours, theirs)), max(size(theirs), floor)
    if distance == 0:
        return 0.0
    return distance / scale if scale > 0 else float("inf")
