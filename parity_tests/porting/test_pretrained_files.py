"""`.safetensors` files: written as by the library, read as views, every false header refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import jax_moe
from jax_moe import disk
from jax_moe.porting.formats import safetensors as tensor_file
from jax_moe.porting.formats.safetensors import map_tensors, reads_as, write_tensors
from jax_moe.porting.formats.shards import DTYPES, open_weights
from jax_moe.porting.table import arrays as stacking
from jax_moe.porting.table.plan import Piece, assemble, memory_order, take_apart
from jax_moe.porting.tensors import Header
from parity_tests.porting.decoder_cases import decoder

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = {**ENTRY, "data_offsets": [8, 16]}


def state() -> dict[str, np.ndarray]:
    """Tensors of all dtypes: empty, a scalar, with names that JSON escapes, and a view that is not contiguous."""
    generator = np.random.default_rng(0)
    drawn = {f"b.{code}": generator.normal(size=(3, 5)).astype(dtype) for code, dtype in DTYPES.items()}
    view = generator.normal(size=(4, 6)).astype(np.float32).T
    return {**drawn, "a": np.array(2.5, np.float32), 'c"é\n': np.zeros((0, 2), ml_dtypes.bfloat16), "view": view}


def headers(values: dict[str, np.ndarray]) -> dict[str, Header]:
    """The headers of arrays to write."""
    return {  # type: ignore[misc]
        name: Header(value.shape, value.dtype, lambda value=value: value) for name, value in values.items()
    }


def test_the_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    values = state()
    write_tensors(tmp_path / "ours.safetensors", headers(values))
    contiguous = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in values.items()}
    save_file(contiguous, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    read = map_tensors(tmp_path / "ours.safetensors")
    assert read.keys() == values.keys()
    assert all(disk.same_bits(read[name].read(), contiguous[name]) for name in values)
    assert not read["a"].read().flags.writeable


@pytest.mark.parametrize("checked", [1 << 24, 64])
def test_a_bit_that_differs_is_found(checked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared as whole tensors or, above `checked` bytes, some rows at a time."""
    monkeypatch.setattr(tensor_file, "CHECKED_BYTES", checked)
    first, second = np.arange(65, dtype=np.float32).reshape(13, 5), np.ones((2, 3), np.float16)
    write_tensors(tmp_path / "x.safetensors", headers({"one": first, "two": second}))
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert reads_as(file, "one", first) and reads_as(file, "two", second)
        assert not reads_as(file, "one", first + np.float32(1e-3) * (first == 64))
        assert not reads_as(file, "two", second.T) and not reads_as(file, "one", first.view(np.int32))


def test_a_file_that_does_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header gives another dtype than the data."""
    monkeypatch.setitem(tensor_file.CODES, DTYPES["F16"], "BF16")
    values = {"b": np.ones(3, np.float16), "a": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=r"x.safetensors: must read back as written; differs in b$"):
        write_tensors(tmp_path / "x.safetensors", headers(values))


def test_more_than_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "BATCH_BYTES", 100)
    write_tensors(tmp_path / "x.safetensors", headers(state()))
    assert map_tensors(tmp_path / "x.safetensors").keys() == state().keys()
    write_tensors(tmp_path / "empty.safetensors", {})
    assert not map_tensors(tmp_path / "empty.safetensors")


def text(header: Any) -> bytes:
    """The bytes of a header in a file."""
    return header if isinstance(header, bytes) else json.dumps(header).encode()


LIES: dict[str, tuple[Any, str]] = {
    "overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, "invalid offset for tensor `b`"),
    "the same bytes": ({"a": ENTRY, "b": ENTRY}, "not one or is cut short .*invalid offset"),
    "hole": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}}, "invalid offset for tensor `b`"),
    "hole at the end": ({"a": ENTRY}, "incomplete metadata, file not fully covered"),
    "beyond the end": ({"a": ENTRY, "b": {**ENTRY, "shape": [4], "data_offsets": [8, 24]}}, "incomplete metadata"),
    "backwards": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 8]}}, "invalid offset"),
    "another size": ({"a": ENTRY, "b": {**SECOND, "shape": [3]}}, "cut short"),
    "absurd shape": ({"a": ENTRY, "b": {**SECOND, "shape": [2**62, 4]}}, "overflow"),
    "negative": ({"a": ENTRY, "b": {**SECOND, "shape": [-2]}}, "invalid JSON in header"),
    "twice": (text({"a": ENTRY, "b": SECOND})[:-1] + b', "a": ' + text(ENTRY) + b"}", "its header says twice: a"),
    "twice within": (
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', "duplicate field"
    ),
    "no such dtype": ({"a": ENTRY, "b": {**SECOND, "dtype": "Q7"}}, "unknown variant `Q7`"),
    "a list": ([ENTRY], "invalid JSON in header"),
    "no text": (b"\xff\xfe", "invalid UTF-8 in header"),
    "deep": (b"[" * 5000, "invalid JSON in header"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_header_is_refused(name: str, tmp_path: Path) -> None:
    header, message = LIES[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text(header))) + text(header) + bytes(16))
    with pytest.raises(ValueError, match=message) as caught:
        open_weights(tmp_path)
    assert "\n" not in str(caught.value) and "model.safetensors must be a whole" in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 17, 10**8 + 1, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(ValueError, match=r"must be a whole \.safetensors file"):
        open_weights(tmp_path)


def test_dtypes_that_are_not_supported_are_all_named(tmp_path: Path) -> None:
    last = {**ENTRY, "dtype": "I32", "data_offsets": [16, 24]}
    header = text({"a": {**ENTRY, "dtype": "F8_E4M3", "shape": [8]}, "b": SECOND, "c": last})
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(ValueError, match=r"must be one of F64, F32, F16, BF16: a is F8_E4M3, c is I32$"):
        open_weights(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], dict[str, bytes]]:
    """A folder to be damaged, its two files, and its tensors."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = decoder("mixtral", num_layers=1, sliding_window=None, sliding_layers=())
    jax_moe.save_pretrained(model, folder, model_type="mixtral")
    return folder, {file.name: file.read_bytes() for file in folder.iterdir()}, tensors(folder)


def tensors(folder: Path) -> dict[str, bytes]:
    """{name: dtype, shape, bytes}."""
    return {name: f"{h.dtype}{h.shape}".encode() + h.read().tobytes() for name, h in open_weights(folder).items()}


def damage(raw: bytes, cut: int, flips: list[tuple[int, int]]) -> bytes:
    """The bytes without the last `cut` of them, with some bits flipped."""
    spoilt = bytearray(raw[: len(raw) - cut])
    for place, bits in flips:
        if spoilt:
            spoilt[place % len(spoilt)] ^= bits
    return bytes(spoilt)


FLIPS = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), max_size=2)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cut=st.sampled_from([0, 0, 0, 1, 7, 100, 10**6]), flips=FLIPS)
def test_a_damaged_header_is_refused_or_says_the_same(
    tiny: tuple[Path, dict[str, bytes], dict[str, bytes]], cut: int, flips: list[tuple[int, int]]
) -> None:
    """Only ValueError is raised; a file that opens has whole tensors, equal under unchanged names."""
    folder, raw, before = tiny
    file = folder / "model.safetensors"
    (size,) = struct.unpack("<Q", raw[file.name][:8])
    head, body = raw[file.name][: 8 + size], raw[file.name][8 + size :]
    try:
        file.write_bytes(damage(head + body, cut, []) if cut else damage(head, 0, flips) + body)
        found = tensors(folder)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert not cut or cut >= 10**6
        changed = [name for name in found if found[name] != before.get(name)]
        assert len(changed) <= 2 * len(flips)
    finally:
        file.write_bytes(raw[file.name])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(flips=FLIPS, cut=st.sampled_from([0, 0, 0, 1, 50]))
def test_a_damaged_config_is_refused_or_loads(
    tiny: tuple[Path, dict[str, bytes], dict[str, bytes]], cut: int, flips: list[tuple[int, int]]
) -> None:
    folder, raw, _ = tiny
    file = folder / "config.json"
    try:
        file.write_bytes(damage(raw[file.name], cut, flips))
        jax_moe.load_pretrained(folder)
    except ValueError as error:
        assert "\n" not in str(error)
    finally:
        file.write_bytes(raw[file.name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000: must be at most 10,000"),
        ({"num_hidden_layers": 9999}, "num_hidden_layers=9999: must fit the weights, which are 22 tensors"),
        (
            {"num_local_experts": 10**12},
            r"num_layers \* num_experts=1000000000000: must fit the weights, which are \d+ numbers",
        ),
        ({"vocab_size": 10**15}, "vocab_size=1000000000000000: must fit"),
        ({"intermediate_size": 10**15}, "expert_dim=1000000000000000: must fit"),
        ({"head_dim": 10**15}, r"num_heads \* head_dim=4000000000000000: must fit"),
    ],
)
def test_a_config_far_beyond_its_tensors(
    tiny: tuple[Path, dict[str, bytes], dict[str, bytes]], changes: dict[str, int], message: str
) -> None:
    """It is refused before anything of that size is made."""
    folder, raw, _ = tiny
    try:
        (folder / "config.json").write_text(json.dumps(json.loads(raw["config.json"]) | changes))
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            jax_moe.load_pretrained(folder)
    finally:
        (folder / "config.json").write_bytes(raw["config.json"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_finite(dtype: np.dtype) -> None:
    largest = np.array([np.finfo(np.float16).max if dtype == np.float16 else 3e38, -1.0, 0.0], dtype)
    values = np.resize(largest, (7, 5, 11)).astype(dtype)
    view = values.transpose(2, 0, 1)
    assert stacking.all_finite(values) and stacking.all_finite(view) and stacking.all_finite(values[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        values[6, 4, 10] = bad
        assert not stacking.all_finite(view) and not stacking.all_finite(values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_large_transposed_pieces(dtype: str) -> None:
    """Arrays large enough to be copied in strips; a window is that part of the whole."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    theirs = np.random.default_rng(0).normal(size=(2 * 130, 150)).astype(kind)
    whole = slice(None)
    piece = Piece("t", "o", (2, 130, 150), (1, whole, whole), (130, 150), (0, whole, whole), (1, 0))
    ours = np.zeros((1, 150, 130), kind)
    assemble(piece, theirs, ours)
    np.testing.assert_array_equal(ours[0], theirs[130:].T)
    part = np.zeros((1, 50, 130), kind)
    assemble(piece, theirs, part, (slice(0, 1), slice(10, 60), slice(0, 130)))
    np.testing.assert_array_equal(part, ours[:, 10:60])
    back = np.zeros_like(theirs)
    take_apart(piece, ours, back)
    np.testing.assert_array_equal(back[130:], theirs[130:])
    assert memory_order(piece) == (0, 2, 1) and not back[:130].any()


REFUSED: list[Callable[[Path], Any]] = [lambda f: f / "no" / ("x" * 300) / "where", lambda f: f / ("x" * 300)]


@pytest.mark.parametrize("where", REFUSED)
def test_no_place_to_write(where: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        jax_moe.save_pretrained(decoder("mixtral"), where(tmp_path), model_type="mixtral")
    assert not list(tmp_path.iterdir())
