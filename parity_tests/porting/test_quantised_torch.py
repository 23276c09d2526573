"""Quantised weights against transformers' own functions, bit for bit, and a whole fp8 and MXFP4 folder read by both."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe.porting.formats.quantised import read_scheme
from jax_moe.porting.tensors import in_memory
from moe_parity.sides.transformers import load_reference
from parity_tests.porting.quantised_cases import CASES, folders, fp8, of
from parity_tests.shared.compare import check_exact

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

from transformers.integrations.finegrained_fp8 import Fp8Dequantize  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402

from jax_moe.porting.formats.quantised.fp8 import not_converted  # noqa: E402
from jax_moe.porting.torch_tensors import tensor_to_numpy  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32")
BYTES = np.arange(256, dtype=np.uint8)
SCALES = {
    "float32": np.random.default_rng(0).lognormal(0, 30, size=(4, 8)).astype(np.float32),
    "bfloat16": np.random.default_rng(1).lognormal(0, 30, size=(4, 8)).astype(ml_dtypes.bfloat16),
    "exponents": BYTES.reshape(8, 32).view(ml_dtypes.float8_e8m0fnu), "bytes": BYTES.reshape(8, 32),
}


def as_torch(array: np.ndarray) -> Any:
    """A tensor with the same bits, of PyTorch's own dtype."""
    kinds = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e8m0fnu": torch.float8_e8m0fnu, "bfloat16": torch.bfloat16}
    kind = kinds.get(array.dtype.name)
    if kind is None:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.int16 if array.itemsize == 2 else np.uint8).copy()).view(kind)


def check_same(mine: np.ndarray, theirs: Any, what: str) -> None:
    """Raises unless equal, bit for bit; any NaN equals any other."""
    other = tensor_to_numpy(theirs)
    assert mine.dtype == other.dtype
    both = [np.where(np.isnan(one.astype(np.float32)), one.dtype.type(np.nan), one) for one in (mine, other)]
    check_exact({what: both[0]}, {what: both[1]}, what)


def read(config: dict[str, Any], dtype: str, state: dict[str, np.ndarray]) -> np.ndarray:
    """The one tensor of a state, as our reader computes it."""
    scheme = read_scheme({"quantization_config": config, "dtype": dtype})
    assert scheme is not None
    headers = in_memory(state)
    ((name, parts),) = scheme.grouped(headers).items()
    return scheme.tensor(name, {part: headers[stored] for part, stored in parts.items()}).read()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_fp8(scale: str, dtype: str) -> None:
    """Every byte under scales from below the smallest number to beyond the largest."""
    scales = SCALES[scale]
    rows, columns = (2 * size for size in scales.shape)
    weight = np.resize(BYTES, (rows, columns)).view(ml_dtypes.float8_e4m3fn)
    mine = read(of("fp8", weight_block_size=[2, 2]), dtype, {"x.weight": weight, "x.weight_scale_inv": scales})
    theirs = Fp8Dequantize(None)._dequantize_one(as_torch(weight), as_torch(scales), getattr(torch, dtype))
    check_same(mine, theirs, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_and_mxfp4(dtype: str) -> None:
    """Every pair of numbers under every exponent."""
    packed = np.broadcast_to(BYTES.reshape(16, 1, 16), (16, 256, 16)).copy()
    scales = np.broadcast_to(BYTES, (16, 256)).copy()
    mine = read(of("mxfp4"), dtype, {"x_blocks": packed[None], "x_scales": scales[None]})
    theirs = convert_moe_packed_tensors(as_torch(packed[None]), as_torch(scales[None]), dtype=getattr(torch, dtype))
    check_same(mine, theirs, "mxfp4")
    weight, exponents = packed.reshape(16, -1).view(np.int8), scales.view(ml_dtypes.float8_e8m0fnu)
    config = of("fp8", expert_dtype="fp4")
    mine = read(config, dtype, {"x.weight": weight, "x.scale": exponents})
    theirs = Fp8Dequantize(None)._dequantize_one(as_torch(weight), as_torch(exponents), getattr(torch, dtype))
    check_same(mine, theirs, "fp4")


PATTERNS = (
    "lm_head", "mlp.gate", "model.layers.1", "model.layers.*.self_attn", "gate", "layers.1.mlp",
    r"model\.layers\.\d+\.mlp",
)
MODULES = (
    "lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj", "model.layers.11.self_attn.q_proj",
    "model.layers.11.mlp.up_proj", "model.norm",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists_of_modules(pattern: str) -> None:
    """The modules that transformers does not convert."""
    mine = {module: not_converted([pattern], module) for module in MODULES}
    assert mine == {module: not should_convert_module(module, [pattern]) for module in MODULES}


@pytest.fixture
def dequantising(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers dequantises without accelerate and without an accelerator, as it does where both are missing."""
    for name in ("FineGrainedFP8HfQuantizer", "Mxfp4HfQuantizer"):
        kind = getattr(transformers.quantizers.auto, name)

        def validate(self: Any, *_: Any, **__: Any) -> None:
            self.quantization_config.dequantize = True

        monkeypatch.setattr(kind, "validate_environment", validate)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def reference(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """The weights of the model that transformers reads, as it writes them again without quantisation."""
    model = getattr(transformers, kind).from_pretrained(folder, dtype="auto", local_files_only=True)
    state = {name: tensor_to_numpy(value) for name, value in model.state_dict().items()}
    assert {value.dtype.name for value in state.values()} == {"bfloat16"}
    return state


def test_a_whole_fp8_folder(tmp_path: Path, dequantising: None) -> None:
    """Mixtral, blocks that divide, per-expert names in the file and fused ones in memory."""
    config = of("fp8", fmt="e4m3", weight_block_size=[2, 2], activation_scheme="dynamic")
    case = replace(CASES["fp8"], config=config, store=partial(fp8, block=(2, 2)))
    quantised, _ = folders(case, tmp_path)
    mine = jax_moe.to_torch(jax_moe.load_pretrained(quantised), layout="hf_mixtral_fused")
    check_exact(mine, reference(quantised, "MixtralForCausalLM"), "fp8")


def test_a_whole_mxfp4_folder(tmp_path: Path, dequantising: None) -> None:
    """gpt-oss, as it is released."""
    quantised, _ = folders(CASES["mxfp4"], tmp_path)
    mine = jax_moe.to_torch(jax_moe.load_pretrained(quantised), layout="hf_gpt_oss")
    check_exact(mine, reference(quantised, "GptOssForCausalLM"), "mxfp4")


def test_the_reference_of_a_quantised_folder(tmp_path: Path) -> None:
    """What `jax-moe parity` compares with has the dequantised weights, without further packages."""
    quantised, plain = folders(CASES["int4, groups"], tmp_path)
    model = load_reference(quantised, "mixtral", "bfloat16")
    expected = jax_moe.to_torch(jax_moe.load_pretrained(plain), layout="hf_mixtral_fused")
    check_exact({name: tensor_to_numpy(value) for name, value in model.state_dict().items()}, expected, "int4")
    assert model.config.output_router_logits and not hasattr(model.config, "quantization_config")
