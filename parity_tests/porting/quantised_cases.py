"""Quantised folders made by numpy: random stored bits, and the numbers that the documented formulas give for them.

The expected numbers are worked out element by element in Python's floats, by another route than the reader's.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

import jax_moe
from jax_moe.porting.families import FAMILIES
from jax_moe.porting.tensors import DTYPES, PACKED
from parity_tests.porting.decoder_cases import decoder, weights
from parity_tests.shared.filled import filled

BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
CODES = {dtype: code for code, dtype in (DTYPES | PACKED).items()}
FP4 = [sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A scheme: what config.json says, which tensors are quantised, and how one is stored, with what it means."""

    config: dict[str, Any]
    store: Callable[[str, tuple[int, ...], np.random.Generator], tuple[State, np.ndarray]]
    family: str = "mixtral"
    endings: tuple[str, ...] = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight")

    def takes(self, name: str) -> bool:
        """Whether the tensor is quantised."""
        return name.endswith(self.endings)


def rounded(numbers: np.ndarray, first: Any = np.float32) -> np.ndarray:
    """As the model computes them, rounded to `first` before."""
    return numbers.astype(first).astype(BF16)


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent, three of mantissa."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def some_bytes(shape: tuple[int, ...], generator: np.random.Generator, top: int = 256) -> np.ndarray:
    return generator.integers(0, top, size=shape, dtype=np.uint8)


def fp8(name: str, shape: tuple[int, ...], generator: np.random.Generator, *, block: tuple[int, int] | None = (4, 3),
        ending: str = "_inv", scale: Any = np.float32) -> tuple[State, np.ndarray]:
    """A scale a block, the blocks at the edges cut off; `scale` is its dtype."""
    rows, columns = shape
    tall, wide = block or shape
    grid = (-(-rows // tall), -(-columns // wide))
    raw = some_bytes(shape, generator) & 0xF7  # no NaN, which is all seven bits set
    exponents = generator.integers(120, 130, size=grid)
    scales = (2.0 ** (exponents - 127.0)) * (1 if scale in (E8M0, np.uint8) else generator.uniform(1, 2, size=grid))
    stored = exponents.astype(np.uint8) if scale is np.uint8 else scales.astype(scale)
    numbers = scales.astype(np.float32)
    value = [[e4m3(int(raw[i, j])) * float(numbers[i // tall, j // wide]) for j in range(columns)] for i in range(rows)]
    module = name.removesuffix(".weight")
    called = f"{module}.scale" if ending == ".scale" else f"{name}_scale{ending}"
    return {name: raw.view(E4M3), called: stored.reshape(() if block is None else grid)}, rounded(np.array(value))


def fp4(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[State, np.ndarray]:
    """Two numbers a byte, the first in the low bits; a scale of 32 columns, here of all."""
    rows, columns = shape
    raw = some_bytes((rows, columns // 2), generator)
    exponents = generator.integers(120, 130, size=(rows, 1)).astype(np.uint8)
    value = [[FP4[int(raw[i, j // 2]) >> 4 * (j % 2) & 15] * 2.0 ** (int(exponents[i, 0]) - 127)
              for j in range(columns)] for i in range(rows)]
    scale = name.replace(".weight", ".scale")
    return {name: raw.view(np.int8), scale: exponents.view(E8M0)}, rounded(np.array(value))


def mxfp4(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[State, np.ndarray]:
    """Blocks of 32 along what is the model's second dim."""
    experts, inner, out = shape
    raw = some_bytes((experts, out, inner // 32, 16), generator)
    scales = generator.integers(120, 130, size=raw.shape[:-1]).astype(np.uint8)
    value = np.empty(shape)
    for e, i, j in np.ndindex(*shape):
        group, place = divmod(i, 32)
        nibble = int(raw[e, j, group, place // 2]) >> 4 * (place % 2) & 15
        value[e, i, j] = FP4[nibble] * 2.0 ** (int(scales[e, j, group]) - 127)
    return {f"{name}_blocks": raw, f"{name}_scales": scales}, rounded(value)


def integers(
    name: str, shape: tuple[int, ...], generator: np.random.Generator, *, bits: int = 4, groups: int = 1,
    packed: bool = True, zero: bool = False, scalar: bool = False,
) -> tuple[State, np.ndarray]:
    """(number - zero point) * scale in bf16; packed, a row is one long number, its last digit first."""
    rows, columns = shape
    low, high = -(1 << bits - 1), (1 << bits - 1)
    numbers = generator.integers(low, high, size=shape)
    scales = generator.uniform(0.5, 2, size=(1, 1) if scalar else (rows, groups)).astype(BF16)
    zeros = generator.integers(low, high, size=(rows, groups))
    if not zero:
        zeros[:] = 0
    each = columns // groups
    wide = np.broadcast_to(scales.astype(np.float64), (rows, groups))
    value = [[(int(numbers[i, j]) - int(zeros[i, j // each])) * wide[i, j // each] for j in range(columns)]
             for i in range(rows)]
    module = name.removesuffix(".weight")
    state: State = {f"{module}.weight_scale": scales.reshape(1) if scalar else scales}
    if packed:
        words = -(-columns * bits // 32)
        state[f"{module}.weight_packed"] = np.array([_words(row - low, bits, words) for row in numbers])
        state[f"{module}.weight_shape"] = np.array(shape, np.int64)
    else:
        state[name] = numbers.astype(np.int8)
    if zero:
        words = -(-rows * bits // 32)
        state[f"{module}.weight_zero_point"] = np.array([_words(column - low, bits, words) for column in zeros.T]).T
    return state, rounded(np.array(value), BF16)


def grouped(name: str, shape: tuple[int, ...], generator: np.random.Generator, zero: bool) -> tuple[State, np.ndarray]:
    """int4 in groups of two columns."""
    return integers(name, shape, generator, groups=shape[-1] // 2, zero=zero)



def _words(digits: np.ndarray, bits: int, count: int) -> np.ndarray:
    whole = sum(int(digit) << bits * i for i, digit in enumerate(digits))
    return np.frombuffer(whole.to_bytes(4 * count, "little"), "<i4").copy()


def float8(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[State, np.ndarray]:
    """A scale a row."""
    raw = some_bytes(shape, generator) & 0xF7
    scales = generator.uniform(0.5, 2, size=(shape[0], 1)).astype(BF16)
    value = [[e4m3(int(byte)) * float(scales[i, 0]) for byte in row] for i, row in enumerate(raw)]
    state = {name: raw.view(E4M3), name.replace(".weight", ".weight_scale"): scales}
    return state, rounded(np.array(value), BF16)


def of(method: str, **settings: Any) -> dict[str, Any]:
    return {"quant_method": method, **settings}


def compressed(form: str, bits: int, strategy: str, group_size: int | None = None, **more: Any) -> dict[str, Any]:
    """A compressed-tensors config, as the library writes it."""
    args = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": None}}
    return of("compressed-tensors", format=form, config_groups=groups, ignore=["lm_head", "re:.*gate$"])


W123 = ("w1.weight", "w2.weight", "w3.weight")
CASES: dict[str, Case] = {
    "fp8": Case(of("fp8", fmt="e4m3", weight_block_size=[4, 3], activation_scheme="dynamic"), fp8),
    "fp8, a scale a tensor": Case(of("fp8", weight_block_size=None), partial(fp8, block=None)),
    "fp8, scales are exponents": Case(
        of("fp8", weight_block_size=[4, 3], scale_fmt="ue8m0"), partial(fp8, scale=E8M0, ending=".scale")
    ),
    "fp8, scales are bytes": Case(
        of("fp8", weight_block_size=[4, 3], scale_fmt="ue8m0", modules_to_not_convert=["lm_head"]),
        partial(fp8, scale=np.uint8),
    ),
    "fp4 experts": Case(of("fp8", weight_block_size=[128, 128], expert_dtype="fp4"), fp4, endings=W123),
    "mxfp4": Case(
        of("mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router"]), mxfp4,
        "gpt_oss", ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "int4, groups": Case(compressed("pack-quantized", 4, "group", 2), partial(grouped, zero=False), endings=W123),
    "int4, zero points": Case(
        compressed("pack-quantized", 4, "group", 2, symmetric=False), partial(grouped, zero=True), endings=W123
    ),
    "int8, packed": Case(compressed("pack-quantized", 8, "channel"), partial(integers, bits=8)),
    "int8": Case(compressed("int-quantized", 8, "channel"), partial(integers, bits=8, packed=False)),
    "int8, a scale a tensor": Case(
        compressed("int-quantized", 8, "tensor"), partial(integers, bits=8, packed=False, scalar=True)
    ),
    "float8, a scale a row": Case(compressed("float-quantized", 8, "channel", type="float"), float8),
}


GPT_OSS: dict[str, Any] = {  # blocks of 32 divide what is quantised
    "vocab_size": 11, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": None, "eos_token_id": None,
}


def plain_folder(case: Case, folder: Path) -> Path:
    """A whole Mixtral or gpt-oss in bf16; the folder that is there, if there is one."""
    if folder.exists():
        return folder
    if case.family != "gpt_oss":
        jax_moe.save_pretrained(decoder(case.family, BF16), folder, model_type=case.family)
        return folder
    values = {"model_type": "gpt_oss", **GPT_OSS}
    config = FAMILIES["gpt_oss"].config(values)
    model = filled(lambda: jax_moe.Decoder(config, param_dtype=BF16, rngs=nnx.Rngs(0)), seed=1)
    jax_moe.save_pretrained(model, folder, model_type="gpt_oss")
    return folder


def write(path: Path, state: State) -> None:
    """A .safetensors file of any dtype."""
    about, end = {}, 0
    for name, value in state.items():
        start, end = end, end + value.nbytes
        about[name] = {"dtype": CODES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(about).encode()
    data = b"".join(np.ascontiguousarray(value).tobytes() for value in state.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def folders(case: Case, where: Path) -> tuple[Path, Path]:
    """A quantised folder in two files, and a plain one of the same numbers."""
    plain, quantised = plain_folder(case, where / "plain"), where / "quantised"
    generator, state, expected = np.random.default_rng(0), dict[str, np.ndarray](), weights(plain)
    for name, value in expected.items():
        stored = {name: value}
        if case.takes(name):
            stored, expected[name] = case.store(name, value.shape, generator)
        state |= stored
    write(plain / "model.safetensors", expected)
    values = json.loads((plain / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    quantised.mkdir()
    rewrite(quantised, state, values | {"quantization_config": case.config})
    return quantised, plain


def rewrite(folder: Path, state: State, values: dict[str, Any]) -> None:
    """Every second tensor in another file, so that a scale is not where its weight is."""
    names, where = sorted(state), dict[str, str]()
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        write(folder / file, {name: state[name] for name in names[number::2]})
        where |= dict.fromkeys(names[number::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(values, indent=1))
