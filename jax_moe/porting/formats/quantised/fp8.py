"""fp8 with block scales, as DeepSeek-V3 is released and as transformers writes it: weight times its block's scale.

The scale of a weight `NAME` is `NAME_scale_inv`; DeepSeek-V4 calls it `.scale`, Mistral `.qscale_weight`. Experts of
DeepSeek-V4 hold two e2m1 numbers a byte, with a scale of every 32. Blocks at the edges may be cut off, as in DeepSeek's
own reader; transformers refuses such shapes.
"""

from functools import partial

import ml_dtypes
import numpy as np

from jax_moe.config.checks import is_int
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

E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
SCALES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), E8M0, np.dtype(np.uint8))
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)  # by its four bits
FP4_BLOCK = (1, 32)


def read_fp8(settings: Settings, dtype: np.dtype) -> Scheme:
    """The scheme of these settings."""
    settings.choice("fmt", "e4m3", ("e4m3",))
    settings.choice("scale_fmt", "float", ("float", "ue8m0"))
    fp4 = settings.choice("expert_dtype", "fp8", ("fp8", "fp4")) == "fp4"
    block = settings.values.get("weight_block_size", (128, 128))
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(is_int(size) and size > 0 for size in block)
    ):
        settings.wrong("weight_block_size", "two integers of at least 1, or null for a scale a tensor")
        block = None
    size = None if block is None else (block[0], block[1])
    blocks = "a scale a tensor" if size is None else f"blocks of {size[0]} x {size[1]}"
    listed = [*(settings.strings("modules_to_not_convert") or ()), *(settings.strings("ignored_layers") or ())]
    return Scheme(
        words=f"fp8, {blocks}" + (", experts in fp4" if fp4 else ""),
        endings={
            "_scale_inv": ("", "scale"), ".qscale_weight": (".weight", "scale"), ".scale": (".weight", "scale")
        },
        unused=(".activation_scale", ".input_scale", "_activation_scale", ".qscale_act"),
        quantised=partial(_quantised, size, fp4, dtype), kept=partial(not_converted, listed),
    )


def not_converted(listed: list[str], module: str) -> bool:
    """Whether a list of modules names one, as transformers reads such lists: a start, a pattern or an ending."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(module.endswith(each) or matches(rf"(?:{each}){boundary}", module) for each in listed)


def _quantised(block: tuple[int, int] | None, fp4: bool, dtype: np.dtype, name: str, parts: Parts) -> Header:
    need(name, parts, {"weight": (np.dtype(np.int8), E4M3) if fp4 else (E4M3,), "scale": SCALES})
    weight, scale = parts["weight"], parts["scale"]
    if len(weight.shape) < 2:
        raise ValueError(f"{name}: the shape of its weight is {list(weight.shape)}, must be of at least two dims")
    packed = weight.dtype == np.int8
    *leading, rows, columns = (*weight.shape[:-1], weight.shape[-1] * (2 if packed else 1))
    size = FP4_BLOCK if packed else block
    if size is None:
        if scale.shape not in ((), (1,)):
            fits(name, "scale", scale.shape, (*leading, 1, 1), "a scale a tensor")
        size = (max(rows, 1), max(columns, 1))
    else:
        grid = (*leading, -(-rows // size[0]), -(-columns // size[1]))
        fits(name, "scale", scale.shape, grid, f"blocks of {size[0]} x {size[1]} of {[*leading, rows, columns]}")
    shape = (*leading, rows, columns)
    return made_of(parts, shape, dtype, dequantise_fp8, size)


def dequantise_fp8(parts: Parts, shape: tuple[int, ...], dtype: np.dtype, block: tuple[int, int]) -> np.ndarray:
    """The product in fp32, rounded once; some rows of one matrix at a time."""
    value, (*leading, rows, columns) = np.empty(shape, dtype), shape
    stored, scales = parts["weight"].read(), as_fp32(parts["scale"].read())
    scales = scales if scales.ndim > 1 else np.broadcast_to(scales, (*leading, 1, 1))
    for at in np.ndindex(*leading):
        for strip in in_strips((rows, columns), block[0]):
            part = stored[at][strip]
            numbers = part.astype(np.float32) if part.dtype == E4M3 else E2M1[unpacked(part, 4)]
            own = scales[at][strip.start // block[0] : -(-strip.stop // block[0])]
            wide = np.repeat(own, block[1], axis=1)[:, :columns]
            value[at][strip] = numbers * np.repeat(wide, block[0], axis=0)[: len(numbers)]
    return value


def as_fp32(scale: np.ndarray) -> np.ndarray:
    """Scales as numbers."""
    return np.ldexp(np.float32(1), exponents(scale)) if scale.dtype == np.uint8 else scale.astype(np.float32)


def exponents(scale: np.ndarray) -> np.ndarray:
    """Of scales that are stored as bytes: 127 says a scale of 1."""
    return scale.astype(np.int32) - 127
