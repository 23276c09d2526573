"""The formats of the library compressed-tensors in which mixtures are published: (number - zero point) * scale.

`pack-quantized`: int4 or int8 packed into int32 words along the rows, the lowest bits first, with an offset of half the
range (`M.weight_packed`, `M.weight_scale`, `M.weight_shape`, `M.weight_zero_point` packed along the columns).
`int-quantized` and `float-quantized`: int8 or fp8 as they are (`M.weight`, `M.weight_scale`). The arithmetic is done in
the dtype of the scales, as the library does, and the result is rounded to the model's.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jax_moe.porting.families.settings import Settings
from jax_moe.porting.formats.quantised.scheme import (
    Parts,
    Scheme,
    fits,
    in_strips,
    made_of,
    matches,
    need,
    unpacked,
)
from jax_moe.porting.tensors import Header

INT8, INT32, INT64 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.int64)
SCALES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
NUMBERS = {"int-quantized": INT8, "float-quantized": np.dtype(ml_dtypes.float8_e4m3fn)}
FORMATS = {"pack-quantized": ("int", (4, 8)), "int-quantized": ("int", (8,)), "float-quantized": ("float", (8,))}
STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class Group:
    """How the modules that `targets` name are quantised."""

    targets: tuple[str, ...]
    format: str
    bits: int
    strategy: str
    group_size: int | None
    symmetric: bool


def read_compressed_tensors(settings: Settings, dtype: np.dtype) -> Scheme:
    """The scheme of these settings."""
    fallback = settings.values.get("format")
    groups = settings.take("config_groups", dict, {}) or {}
    if not groups:
        settings.wrong("config_groups", "an object with at least one group")
    read = [_group(settings, name, values, fallback) for name, values in groups.items()]
    ignored = settings.strings("ignore") or []
    words = dict.fromkeys(f"{scheme.format} of {scheme.bits} bits, a scale a {_each(scheme)}" for scheme in read)
    return Scheme(
        words=f"compressed-tensors: {' and '.join(words)}",
        endings={f".weight_{part}": (".weight", part) for part in ("packed", "scale", "shape", "zero_point")},
        unused=(".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale"),
        quantised=partial(_quantised, read, dtype), kept=partial(_named, ignored),
    )


def _each(group: Group) -> str:
    return f"group of {group.group_size}" if group.strategy == "group" else group.strategy


def _group(settings: Settings, name: str, values: Any, fallback: Any) -> Group:
    """A group of modules; its own `format` counts before that of all."""
    inner = Settings({"format": fallback}, settings.errors, f"{settings.prefix}config_groups.{name}.")
    if isinstance(values, dict):
        own = {name: value for name, value in values.items() if value is not None}
        inner = Settings({**inner.values, **own}, inner.errors, inner.prefix)
    stored = inner.choice("format", "pack-quantized", FORMATS)
    if "weights" not in inner.values or inner.values["format"] is None:
        missing = "weights" if "weights" not in inner.values else "format"
        settings.errors.append(f"{inner.prefix}{missing} is missing")
    weights = Settings(inner.take("weights", dict, {}), inner.errors, f"{inner.prefix}weights.")
    bits, (kind, allowed) = weights.integer("num_bits", 8), FORMATS[stored]
    if weights.choice("type", "int", ("int", "float")) != kind:
        weights.wrong("type", f"{kind!r} in {stored}")
    if bits not in allowed:
        weights.wrong("num_bits", f"{' or '.join(map(str, allowed))} in {stored}")
    size = weights.integer("group_size", None)
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.choice("strategy", implied, STRATEGIES) if weights.values.get("strategy") else implied
    if strategy == "group" and (size is None or size < 1):
        weights.wrong("group_size", "an integer of at least 1 where scales are of groups")
    if weights.values.get("actorder") not in (None, False, "weight", "static"):
        weights.wrong("actorder", "null, 'weight' or 'static': columns stand in their order")
    targets = tuple(inner.strings("targets") or ())
    return Group(targets, stored, bits, strategy, size, weights.flag("symmetric", True))


def _named(patterns: list[str] | tuple[str, ...], module: str) -> bool:
    """Whether a list of targets names a module: whole, or by a pattern after `re:`. A class (`Linear`) is no name."""
    return any(matches(each[3:], module) if each.startswith("re:") else each == module for each in patterns)


def _quantised(groups: list[Group], dtype: np.dtype, name: str, parts: Parts) -> Header:
    module = name.rpartition(".")[0]
    classes = (scheme for scheme in groups if any(not target.startswith("re:") for target in scheme.targets))
    group = next((scheme for scheme in groups if _named(scheme.targets, module)), next(classes, groups[0]))
    packed = group.format == "pack-quantized"
    stored = {"packed": (INT32,), "shape": (INT32, INT64)} if packed else {"weight": (NUMBERS[group.format],)}
    optional = ("zero_point",) if group.symmetric else ()
    need(name, parts, {**stored, "scale": SCALES, "zero_point": (INT32, INT8)}, optional)
    shape = _shape(name, parts, group) if packed else parts["weight"].shape
    if len(shape) < 2:
        raise ValueError(f"{name}: the shape of its weight is {list(shape)}, must be of at least two dims")
    size = group.group_size if group.strategy == "group" else max(shape[-1], 1)
    assert size is not None
    if shape[-1] % size:
        raise ValueError(f"{name}: its {shape[-1]} columns must be a multiple of group_size={size}")
    scale, grid = parts["scale"].shape, (*shape[:-1], shape[-1] // size)
    if group.strategy != "tensor" or scale not in ((), (1, 1)):
        must = (1,) if group.strategy == "tensor" else grid
        fits(name, "scale", scale, must, f"a scale a {_each(group)} of {list(shape)}")
    if "zero_point" in parts:
        words = (*grid[:-2], -(-grid[-2] * group.bits // 32), grid[-1])
        must = words if _in_words(group, parts) else scale
        fits(name, "zero_point", parts["zero_point"].shape, must, f"one for each scale of {list(shape)}")
    return made_of(parts, shape, dtype, dequantise_integers, group, grid)


def _shape(name: str, parts: Parts, group: Group) -> tuple[int, ...]:
    """The shape before packing, which stands in a tensor of two or three numbers."""
    packed, said = parts["packed"].shape, parts["shape"]
    fits(name, "shape", said.shape, (len(packed),), f"a number for each dim of {list(packed)}")
    shape = tuple(int(size) for size in said.read())
    words = (*shape[:-1], -(-shape[-1] * group.bits // 32)) if shape else ()
    fits(name, "packed", packed, words, f"{list(shape)} numbers of {group.bits} bits")
    return shape


def _in_words(group: Group, parts: Parts) -> bool:
    """Whether zero points are packed, down the columns."""
    return group.strategy != "tensor" and parts["zero_point"].dtype == INT32


def dequantise_integers(
    parts: Parts, shape: tuple[int, ...], dtype: np.dtype, group: Group, grid: tuple[int, ...]
) -> np.ndarray:
    """In the dtype of the scales, then rounded to the model's; some rows at a time."""
    rows = grid[:-1]
    value = np.empty((math.prod(rows), shape[-1]), dtype)
    stored = parts["packed" if "packed" in parts else "weight"].read().reshape(len(value), -1)
    scales = _a_row(parts["scale"].read(), grid)
    zeros = None if "zero_point" not in parts else _a_row(_zeros(group, parts, grid), grid)
    for strip in in_strips(value.shape):
        part = stored[strip]
        if "packed" in parts:
            part = _signed(unpacked(part, group.bits)[:, : shape[-1]], group.bits)
        numbers = part.astype(scales.dtype).reshape(len(part), grid[-1], -1)
        if zeros is not None:
            numbers = numbers - zeros[strip].astype(scales.dtype)[..., None]
        value[strip] = (numbers * scales[strip][..., None]).reshape(part.shape)
    return value.reshape(shape)


def _a_row(each: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Scales or zero points for every row and group."""
    return np.broadcast_to(each, grid).reshape(-1, grid[-1])


def _zeros(group: Group, parts: Parts, grid: tuple[int, ...]) -> np.ndarray:
    """The zero points, one for each scale."""
    stored = parts["zero_point"].read()
    if not _in_words(group, parts):
        return stored
    numbers = unpacked(np.swapaxes(stored, -1, -2), group.bits)[..., : grid[-2]]
    return _signed(np.swapaxes(numbers, -1, -2), group.bits)


def _signed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """The integers that were packed with an offset of half their range."""
    return numbers.astype(np.int16) - (1 << (bits - 1))
