"""Tensors that are read on demand, and the check for finite numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

EXPONENT = {2: np.uint16, 4: np.uint32, 8: np.uint64}
CHUNK = 1 << 18  # bytes checked at a time, so that they stay in the cache

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
PACKED = {  # in which quantised folders store parts of tensors
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
}


@dataclass(frozen=True)
class Header:
    """A tensor's shape and dtype, as a file tells them, and how to read it."""

    shape: tuple[int, ...]
    dtype: Any  # a dtype, or the name of one that is not supported
    read: Callable[[], np.ndarray]
    parts: tuple["Header", ...] = ()  # of a quantised tensor: the stored tensors that it is computed from

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def in_memory(arrays: Mapping[str, np.ndarray]) -> dict[str, Header]:
    """Headers for arrays that are in memory already."""
    return {name: Header(tuple(value.shape), value.dtype, partial(_itself, value)) for name, value in arrays.items()}


def _itself(value: np.ndarray) -> np.ndarray:
    return value


def all_finite(value: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity. Exponents are compared as integers, 10x faster in bfloat16."""
    if value.dtype.kind == "i":
        return True
    flat = value.transpose(np.argsort([-stride for stride in value.strides], kind="stable")).reshape(-1)
    kind = EXPONENT[value.itemsize]
    bits = flat.view(kind)
    infinity = int(np.array(np.inf, value.dtype).view(kind))
    step = CHUNK // value.itemsize
    room = np.empty(step, kind)
    for start in range(0, bits.size, step):
        chunk = bits[start : start + step]
        without_sign = np.bitwise_and(chunk, ~np.array(1 << (8 * value.itemsize - 1), kind), out=room[: chunk.size])
        if int(without_sign.max()) >= infinity:
            return False
    return True
