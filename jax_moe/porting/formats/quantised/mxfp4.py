"""MXFP4, as gpt-oss is released: e2m1 numbers, two a byte, and an exponent for every 32 of them.

`NAME_blocks` [E, out, G, 16] and `NAME_scales` [E, out, G] give `NAME` [E, 32 G, out]: transposed, as the model
multiplies it.
"""

from functools import partial

import numpy as np

from jax_moe.porting.families.settings import Settings
from jax_moe.porting.formats.quantised.fp8 import E2M1, exponents, not_converted
from jax_moe.porting.formats.quantised.scheme import Parts, Scheme, fits, in_strips, made_of, need, unpacked
from jax_moe.porting.tensors import Header

BYTE = (np.dtype(np.uint8),)
BYTES = 16  # of a block: 32 numbers


def read_mxfp4(settings: Settings, dtype: np.dtype) -> Scheme:
    """The scheme of these settings."""
    listed = settings.strings("modules_to_not_convert") or []
    return Scheme(
        words="mxfp4, blocks of 32", endings={"_blocks": ("", "blocks"), "_scales": ("", "scales")},
        quantised=partial(_quantised, dtype), kept=partial(not_converted, listed),
    )


def _quantised(dtype: np.dtype, name: str, parts: Parts) -> Header:
    need(name, parts, {"blocks": BYTE, "scales": BYTE})
    blocks, scales = parts["blocks"], parts["scales"]
    if len(blocks.shape) != 4 or blocks.shape[-1] != BYTES:
        must = f"[experts, out, groups, {BYTES}]"
        raise ValueError(f"{name}: the shape of its blocks is {list(blocks.shape)}, must be {must}")
    fits(name, "scales", scales.shape, blocks.shape[:-1], f"one for each block of {list(blocks.shape)}")
    experts, out, groups, _ = blocks.shape
    shape = (experts, groups * 2 * BYTES, out)
    return made_of(parts, shape, dtype, dequantise_mxfp4)


def dequantise_mxfp4(parts: Parts, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The product in fp32, rounded once; some rows of an expert at a time."""
    blocks, scales, value = parts["blocks"].read(), parts["scales"].read(), np.empty(shape, dtype)
    for i in range(shape[0]):
        for strip in in_strips((shape[2], shape[1])):
            numbers = np.ldexp(E2M1[unpacked(blocks[i, strip], 4)], exponents(scales[i, strip])[..., None])
            value[i, :, strip] = numbers.reshape(len(numbers), -1).T
    return value
