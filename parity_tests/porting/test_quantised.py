"""Quantised folders: every scheme against numbers worked out by hand, and all that is done with a folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_moe
from jax_moe.porting.formats import quantised as room
from jax_moe.porting.formats.hf_folder import open_folder
from jax_moe.porting.formats.quantised import compressed_tensors, mxfp4
from jax_moe.porting.formats.quantised import fp8 as fp8_file
from jax_moe.porting.formats.safetensors import map_tensors
from jax_moe.porting.tensors import Header
from jax_moe.stored import stored_variables
from moe_cli.main import main
from parity_tests.cli.commands import fails, run
from parity_tests.porting.quantised_cases import CASES, State, folders, rewrite
from parity_tests.shared.compare import MismatchError, check_exact

MXFP4 = "mxfp4"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The folders of a case, quantised and plain. Tests do not change them."""
    found: dict[str, tuple[Path, Path]] = {}

    def make(case: str) -> tuple[Path, Path]:
        if case not in found:
            found[case] = folders(CASES[case], tmp_path_factory.mktemp("case"))
        return found[case]

    return make


def arrays(folder: Path) -> State:
    """Every tensor as it is computed."""
    return {name: header.read() for name, header in open_folder(folder).stored.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_scheme(case: str, made: Any) -> None:
    """Every tensor of the folder is the plain folder's, bit for bit; a layer's mixture is that of the plain folder."""
    quantised, plain = made(case)
    check_exact(arrays(quantised), arrays(plain), case)
    one, other = jax_moe.load_moe(quantised, 0), jax_moe.load_moe(plain, 0)
    held = [{path: np.asarray(v[...]) for path, v in stored_variables(moe).items()} for moe in (one, other)]
    check_exact(held[0], held[1], case)
    assert jax_moe.moe_layers(quantised) == jax_moe.moe_layers(plain)


def stored_names() -> set[str]:
    return {case.config["quant_method"] for case in CASES.values()}


def test_every_scheme_of_the_list_has_a_case() -> None:
    assert stored_names() == set(room.SCHEMES)


def turned(packed: np.ndarray, bits: int) -> np.ndarray:
    """The planted fault: the high digit of a byte before the low."""
    numbers = REAL(packed, bits)
    return numbers.reshape(*numbers.shape[:-1], -1, 2)[..., ::-1].reshape(numbers.shape)


REAL = fp8_file.unpacked
SCALES, EXPONENTS = fp8_file.as_fp32, fp8_file.exponents
A_ROW = compressed_tensors._a_row


@pytest.mark.parametrize(
    ("case", "module", "name", "fault"),
    [
        ("fp4 experts", fp8_file, "unpacked", turned), (MXFP4, mxfp4, "unpacked", turned),
        ("int4, groups", compressed_tensors, "unpacked", turned),
        ("fp8", fp8_file, "as_fp32", lambda scale: np.roll(SCALES(scale), 1, -1)),
        (MXFP4, mxfp4, "exponents", lambda scale: np.roll(EXPONENTS(scale), 1, 0)),
        ("int8", compressed_tensors, "_a_row", lambda each, grid: np.roll(A_ROW(each, grid), 1, 0)),
    ],
)
def test_a_digit_or_a_scale_out_of_place_is_seen(
    case: str, module: Any, name: str, fault: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits in the wrong order, and a neighbour's scale."""
    quantised, plain = made(case)
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(MismatchError):
        check_exact(arrays(quantised), arrays(plain), case)


def test_large_tensors_are_read_in_strips(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers if a strip is as small as it can be."""
    monkeypatch.setattr("jax_moe.porting.formats.quantised.scheme.ROWS", 1)
    for case in ("fp8", "fp4 experts", MXFP4, "int4, zero points"):
        quantised, plain = made(case)
        check_exact(arrays(quantised), arrays(plain), case)


@pytest.mark.parametrize("case", ["fp8", MXFP4])
def test_a_whole_decoder(case: str, made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded, saved, ported to a folder and to Orbax and back: always the plain folder's weights, and plain."""
    quantised, plain = made(case)
    jax_moe.save_pretrained(jax_moe.load_pretrained(quantised), tmp_path / "saved")
    run(capsys, "port", quantised, tmp_path / "orbax")
    run(capsys, "port", tmp_path / "orbax", tmp_path / "back")
    run(capsys, "port", quantised, tmp_path / "hf", "--to", "hf")
    for name in ("saved", "back", "hf"):
        check_exact(arrays(tmp_path / name), arrays(plain), name)
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in values and values["torch_dtype"] == "bfloat16"
    run(capsys, "port", quantised, tmp_path / "single", "--to", "hf", "--dtype", "float32")
    wide = {name: value.astype(np.float32) for name, value in arrays(plain).items()}
    check_exact(arrays(tmp_path / "single"), wide, "float32")


def test_inspect_says_both_dtypes(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As they are stored and as they are computed."""
    out = run(capsys, "inspect", made("fp8")[0], "--names")
    assert " float8_e4m3fn, " in out and " as stored (fp8, blocks of 4 x 3), " in out
    assert " bfloat16 as computed\n" in out and "\n  weights as computed; training" in out
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert f"{name}  bfloat16  [6, 8]  from float8_e4m3fn [6, 8] and float32 [2, 3]\n" in out
    out = run(capsys, "inspect", made("fp8")[0], "--layers", "1")
    assert "layer 1: 13 tensors, " in out and " as stored (fp8, blocks of 4 x 3), " in out


def test_a_layer_is_put_back(made: Any, tmp_path: Path) -> None:
    """What did not change keeps every bit; a plain tensor may change, a quantised one may not."""
    before, _ = made("int4, groups")
    folder = Path(shutil.copytree(before, tmp_path / "copy"))
    moe = jax_moe.load_moe(folder, 1)
    jax_moe.save_moe(moe, folder, 1)
    assert all((folder / file.name).read_bytes() == file.read_bytes() for file in before.iterdir())
    moe.router.kernel[...] = moe.router.kernel[...] + 1
    jax_moe.save_moe(moe, folder, 1)
    one, other = bits(before), bits(folder)
    assert {name for name in other if other[name] != one[name]} == {"model.layers.1.block_sparse_moe.gate.weight"}
    moe.experts.up[...] = moe.experts.up[...] + 1
    with pytest.raises(ValueError, match=r"wrong: .*1\.block_sparse_moe\.experts\.0\.w3\.weight has changed and is st"):
        jax_moe.save_moe(moe, folder, 1)


def bits(folder: Path) -> dict[str, bytes]:
    """The stored bytes of every tensor."""
    files = folder.glob("*.safetensors")
    return {name: header.read().tobytes() for file in files for name, header in map_tensors(file).items()}


def test_layers_are_ported(made: Any, tmp_path: Path) -> None:
    """Each layer a folder of plain weights."""
    quantised, plain = made(MXFP4)
    assert main(["port", str(quantised), str(tmp_path / "layers"), "--layers", "0"]) == 0
    moe = jax_moe.load(tmp_path / "layers" / "layer_0")
    expected = {"up": np.asarray(jax_moe.load_moe(plain, 0).experts.up[...])}
    check_exact({"up": np.asarray(moe.experts.up[...])}, expected, "ported")


LISTED = "model.layers.0.block_sparse_moe.experts.0.w1"
Edit = Callable[[State, dict[str, Any]], Any]


def setting(name: str, value: Any) -> Edit:
    """Changes an entry of quantization_config; None removes it."""

    def edit(_: State, config: dict[str, Any]) -> None:
        config[name] = value
        if value is None:
            del config[name]

    return edit


def argument(name: str, value: Any) -> Edit:
    """Changes an entry of a compressed-tensors group's weights."""
    return lambda _, config: config["config_groups"]["group_0"]["weights"].update({name: value})


def drop(name: str) -> Edit:
    return lambda state, _: state.pop(name)


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    return lambda state, _: state.update({name: change(state[name])})


FP4_NAME = "model.layers.0.mlp.experts.gate_up_proj"
WRONG: dict[str, tuple[str, Edit, str]] = {
    "an unknown method": ("fp8", setting("quant_method", "gptq"), r"config\.quant_method='gptq': must be one of fp8, "),
    "no method": ("fp8", setting("quant_method", None), r"quantization_config\.quant_method=None: must be one of fp8"),
    "another fp8": ("fp8", setting("fmt", "e5m2"), r"quantization_config\.fmt='e5m2': must be one of e4m3"),
    "a block of one size": ("fp8", setting("weight_block_size", [128]), r"weight_block_size=\[128\]: must be two inte"),
    "a block of 0": ("fp8", setting("weight_block_size", [0, 3]), r"weight_block_size=\[0, 3\]: must be two integers"),
    "another block": (
        "fp8", setting("weight_block_size", [2, 3]), r"w1\.weight: the shape of its scale is \[2, 3\], must be \[3, 3\]"
    ),
    "a list that is none": (
        "fp8", setting("modules_to_not_convert", "x"), r"modules_to_not_convert='x': must be a list"
    ),
    "a missing scale": (
        "fp8", drop(f"{LISTED}.weight_scale_inv"),
        rf"{LISTED}\.weight: its weight is float8_e4m3fn, its scale is missing$",
    ),
    "a missing weight": (
        "fp8", drop(f"{LISTED}.weight"), rf"{LISTED}\.weight: its scale is float32, its weight is missing$"
    ),
    "a scale of a plain weight": (
        "fp8", put(f"{LISTED}.weight", lambda value: value.astype(np.float32)),
        rf"{LISTED}\.weight: its weight is float32, must be float8_e4m3fn$",
    ),
    "scales of another dtype": (
        "fp8", put(f"{LISTED}.weight_scale_inv", lambda value: value.astype(np.int8)),
        r"its scale is int8, must be float32 or ",
    ),
    "a scale too few": (
        "fp8", put(f"{LISTED}.weight_scale_inv", lambda value: value[:, :2].copy()),
        r"the shape of its scale is \[2, 2\], must be \[2, 3\]: blocks of 4 x 3 of \[6, 8\]$",
    ),
    "missing exponents": (
        MXFP4, drop(f"{FP4_NAME}_scales"), rf"{FP4_NAME}: its blocks is uint8, its scales is missing$"
    ),
    "blocks of half the size": (
        MXFP4, put(f"{FP4_NAME}_blocks", lambda value: value[..., :8].copy()),
        r"the shape of its blocks is \[3, 128, 1, 8\], must be \[experts, out, groups, 16\]$",
    ),
    "exponents of another shape": (
        MXFP4, put(f"{FP4_NAME}_scales", lambda value: value[:, :5].copy()),
        r"the shape of its scales is \[3, 5, 1\], must be \[3, 128, 1\]",
    ),
    "blocks of another dtype": (
        MXFP4, put(f"{FP4_NAME}_blocks", lambda value: value.view(np.int8)), r"its blocks is int8, must be uint8$"
    ),
    "a format": (
        "int4, groups", setting("format", "marlin-24"), r"config_groups\.group_0\.format='marlin-24': must be one of "
    ),
    "no groups": ("int4, groups", setting("config_groups", {}), r"config_groups={}: must be an object with at least"),
    "bits": ("int4, groups", argument("num_bits", 3), r"weights\.num_bits=3: must be 4 or 8 in pack-quantized$"),
    "another type": ("int4, groups", argument("type", "float"), r"weights\.type='float': must be 'int' in pack-quant"),
    "a strategy": ("int4, groups", argument("strategy", "token"), r"strategy='token': must be one of group, channel, "),
    "a group that does not divide": (
        "int4, groups", argument("group_size", 5), r"\.w1\.weight: its 8 columns must be a multiple of group_size=5"
    ),
    "another group size": (
        "int4, groups", argument("group_size", 4), r"the shape of its scale is \[6, 4\], must be \[6, 2\]: a scale a "
    ),
    "an order of columns": ("int4, groups", argument("actorder", "group"), r"actorder='group': must be null, 'weight'"),
    "a missing shape": ("int4, groups", drop(f"{LISTED}.weight_shape"), rf"{LISTED}\.weight: its .*, its shape is mis"),
    "a shape of more numbers": (
        "int4, groups", put(f"{LISTED}.weight_shape", lambda value: value * 2),
        r"the shape of its packed is \[6, 1\], must be \[12, 2\]: \[12, 16\] numbers of 4 bits",
    ),
    "missing zero points": (
        "int4, zero points", drop(f"{LISTED}.weight_zero_point"), rf"{LISTED}\.weight: its .*, its zero_point is missin"
    ),
    "words of another dtype": (
        "int4, groups", put(f"{LISTED}.weight_packed", lambda value: value.astype(np.int64)),
        r"its packed is int64, must be int32$",
    ),
    "unsigned bytes": (
        "int8", put(f"{LISTED}.weight", lambda value: value.view(np.uint8)), r"its weight is uint8, must be int8$"
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_line(
    what: str, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any weight is placed, by every reader."""
    case, edit, said = WRONG[what]
    folder = Path(shutil.copytree(made(case)[0], tmp_path / "folder"))
    values = json.loads((folder / "config.json").read_text())
    state = {name: one.read() for file in folder.glob("*.safetensors") for name, one in map_tensors(file).items()}
    edit(state, values["quantization_config"])
    rewrite(folder, state, values)
    monkeypatch.setattr("jax_moe.porting.mixture.place_all", None)
    monkeypatch.setattr("jax_moe.porting.pretrained.place_all", None)
    for load in (lambda: jax_moe.load_moe(folder, 0), lambda: jax_moe.load_pretrained(folder)):
        with pytest.raises(ValueError, match=said) as caught:
            load()
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert str(folder) in fails(capsys, "inspect", folder, "--layers", "0")


def test_a_listed_module_is_read_as_it_is(made: Any, tmp_path: Path) -> None:
    """Listed or not, a tensor without parts beside it is plain; integers without a scale are an error unless listed."""
    case = made("int8")[0]
    scheme = room.read_scheme(json.loads((case / "config.json").read_text()))
    assert scheme is not None
    number = Header((2, 2), np.dtype(np.int8), lambda: np.zeros((2, 2), np.int8))
    assert scheme.tensor("lm_head.weight", {"weight": number}) is number
    assert scheme.tensor("model.layers.0.mlp.gate.weight", {"weight": number}) is number
    assert not compressed_tensors._named(["re:("], "lm_head")
    with pytest.raises(ValueError, match=r"^model\.norm\.weight: its weight is int8, its scale is missing$"):
        scheme.tensor("model.norm.weight", {"weight": number})


@pytest.mark.parametrize(
    ("listed", "module", "found"),
    [
        ("lm_head", "lm_head", True), ("mlp.gate", "model.layers.3.mlp.gate", True),
        ("model.layers.1", "model.layers.1.mlp", True), ("model.layers.1", "model.layers.11.mlp", False),
        ("model.layers.*.self_attn", "model.layers.11.self_attn.q_proj", True),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", False), ("(", "x", False),
    ],
)
def test_lists_of_modules(listed: str, module: str, found: bool) -> None:
    """A start, a pattern or an ending, as transformers reads them."""
    assert fp8_file.not_converted([listed], module) == found
