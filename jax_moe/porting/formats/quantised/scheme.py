"""What a scheme of quantisation is: how a tensor's parts are named beside each other, and what they give together."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_moe.porting.tensors import DTYPES, Header

Parts = Mapping[str, Header]  # by part
ROWS = 1 << 22  # numbers dequantised at a time, so that what is computed in between stays small


@dataclass(frozen=True)
class Scheme:
    """A scheme with its settings from config.json. A tensor without parts beside it is not quantised: it is as stored.

    `endings` are {ending of a stored name: (ending of the tensor's name, part)}, `unused` the endings of what belongs
    to activations. `quantised` checks a tensor's parts and returns its header; it may raise ValueError.
    """

    words: str
    endings: Mapping[str, tuple[str, str]]
    quantised: Callable[[str, Parts], Header]
    kept: Callable[[str], bool]  # whether config.json names a module among those that are not quantised
    unused: tuple[str, ...] = ()

    def grouped(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """{tensor: {part: stored name}}, by names alone."""
        found: dict[str, dict[str, str]] = {}
        for stored in names:
            if not stored.endswith(self.unused):
                name, part = self._named(stored, names)
                found.setdefault(name, {})[part] = stored
        return found

    def _named(self, stored: str, names: Collection[str]) -> tuple[str, str]:
        for ending, (plain, part) in self.endings.items():
            if stored.endswith(ending):
                name = stored.removesuffix(ending) + plain
                # `.scale` also names tensors by themselves
                if ending != ".scale" or name in names:
                    return name, part
        return stored, "weight"

    def tensor(self, name: str, parts: Parts) -> Header:
        """The header of a tensor. Raises ValueError, one line, for parts that do not fit together."""
        alone = parts.keys() == {"weight"}
        if alone and (parts["weight"].dtype in DTYPES.values() or self.kept(name.rpartition(".")[0])):
            return parts["weight"]
        return self.quantised(name, parts)


def matches(pattern: str, name: str) -> bool:
    """Whether a name begins with a regular expression; what is none matches nothing."""
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False


def made_of(parts: Parts, shape: tuple[int, ...], dtype: np.dtype, function: Callable[..., Any], *more: Any) -> Header:
    """The header of a quantised tensor: each reading calls `function` with its parts, shape and dtype."""

    def read() -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # who reads reports NaN and infinity
            return function(parts, shape, dtype, *more)

    return Header(shape, dtype, read, tuple(parts.values()))


def need(name: str, parts: Parts, dtypes: Mapping[str, tuple[np.dtype, ...]], optional: Collection[str] = ()) -> None:
    """Raises ValueError unless exactly these parts are there, each of one of its dtypes."""
    there = " and ".join(f"its {part} is {header.dtype}" for part, header in parts.items())
    missing = [part for part in dtypes if part not in parts and part not in optional]
    if missing:
        raise ValueError(f"{name}: {there}, its {missing[0]} is missing")
    for part, header in parts.items():
        if header.dtype not in dtypes.get(part, ()):
            must = " or ".join(map(str, dtypes[part])) if part in dtypes else "left out"
            raise ValueError(f"{name}: its {part} is {header.dtype}, must be {must}")


def fits(name: str, part: str, found: tuple[int, ...], must: tuple[int, ...], why: str) -> None:
    """Raises ValueError unless a part has that shape."""
    if found != must:
        raise ValueError(f"{name}: the shape of its {part} is {list(found)}, must be {list(must)}: {why}")


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers of 1, 2, 4 or 8 bits, the lowest bits first, along the last axis of bytes or words."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(*raw.shape[:-1], -1)


def in_strips(shape: tuple[int, ...], step: int = 1) -> list[slice]:
    """Parts of the first axis, each of a multiple of `step` rows and of some megabytes."""
    rows = max(1, ROWS // max(1, step * math.prod(shape[1:]))) * step
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]

