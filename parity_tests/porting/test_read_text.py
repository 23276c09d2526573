"""A single reader of texts and of tokenizers: a file gives equal characters and tokens to every command."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jax_moe import MakeMoE, MakeMoEConfig
from jax_moe.generation import text
from jax_moe.porting.checkpoint import Checkpoint
from moe_cli.common import with_characters
from moe_train.configs.settings import ModelSettings, TrainConfig
from moe_train.data import text as data
from moe_train.data import tokens
from moe_train.task import read_task

WORDS = "the quick brown fox\njumps over the lazy dog.\n" * 20


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (b"a\r\nb\rc\n\r\n", "a\nb\nc\n\n"),
        (b"\xef\xbb\xbfabc", "abc"),
        (b"\xef\xbb\xbf", ""),
        ("caf\u00e9 \U0001f600".encode(), "caf\u00e9 \U0001f600"),
        ("a\u2028b\x0bc\x0cd".encode(), "a\u2028b\x0bc\x0cd"),
        (b"", ""),
    ],
)
def test_text_is_what_python_opens(tmp_path: Path, raw: bytes, wanted: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    assert text.read_text(path, "here") == wanted == path.read_text("utf-8-sig")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"caf\xe9", "must be UTF-8, byte 3 is not; if it is latin1: iconv -f latin1 -t utf-8 "),
        ("abc".encode("utf-16"), "must be UTF-8, byte 0 is not; if it is utf-16: iconv -f utf-16 -t utf-8 "),
        (
            "abc".encode("utf-16-le"),
            "must be text; character 1 is NUL, which no text holds (tokens go in a .npy of integers",
        ),
        (np.arange(65, dtype=np.uint16).tobytes(), "--data-dtype uint16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "a text.txt"
    path.write_bytes(raw)
    for read in (lambda: text.read_text(path, str(path)), lambda: data.load_text(str(path), 8)):
        with pytest.raises(ValueError) as caught:
            read()
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_cure_for_latin1_is_one(tmp_path: Path) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("there is no iconv here")
    (tmp_path / "it's.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="iconv") as caught:
        text.read_text(tmp_path / "it's.txt", "here")
    subprocess.run(str(caught.value).partition("latin1: ")[2], shell=True, check=True, cwd=tmp_path)
    assert text.read_text(tmp_path / "new.txt", "here") == "caf\u00e9"


def test_no_reader_waits_for_a_pipe_or_reads_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"must be a readable text file \(it is not a regular file\)"):
            data.load_text(str(path), 8)
    with pytest.raises(ValueError, match="must be a readable text file"):
        data.load_text("a\0b", 8)


def test_a_text_of_windows_has_the_same_characters_everywhere(tmp_path: Path) -> None:
    """Read by train.py, by --text and by makeMoE (Python's open): 15 characters, no carriage return among them."""
    path = tmp_path / "crlf.txt"
    path.write_bytes(b"the lazy dogs.\r\nTHE\r\n" * 30)
    trained = data.load_text(str(path), 8)
    assert trained.vocabulary == "".join(sorted(set(path.read_text("utf-8"))))
    model = MakeMoE(MakeMoEConfig(
        vocab_size=trained.vocab_size, block_size=8, model_dim=8, num_heads=2, num_layers=1, num_experts=2
    ), rngs=nnx.Rngs(0))
    assert with_characters(Checkpoint("makemoe", model), path).characters == trained.vocabulary


def test_a_run_of_the_first_version_keeps_its_characters(tmp_path: Path) -> None:
    """It kept carriage returns and the byte order mark; the sha256 of the file identifies its text."""
    path = tmp_path / "crlf.txt"
    raw = b"\xef\xbb\xbf" + WORDS.replace("\n", "\r\n").encode()
    path.write_bytes(raw)
    before = data.load_text(str(path), 8, sha256=hashlib.sha256(raw).hexdigest())
    assert "\r" in before.vocabulary and "\ufeff" in before.vocabulary
    assert before.sha256 == hashlib.sha256(raw).hexdigest()
    now = data.load_text(str(path), 8, sha256="another")
    assert now.sha256 == hashlib.sha256(WORDS.encode()).hexdigest() and "\r" not in now.vocabulary


def test_a_model_s_characters_are_kept_where_a_text_has_fewer(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc" * 40)
    read = data.load_text(str(path), 8, vocabulary="xabcd")
    assert read.vocab_size == 5 and read.decode(read.train[:3].tolist()) == "abc" and set(read.train) == {1, 2, 3}
    with pytest.raises(ValueError, match=r"must be of the 2 characters that the model knows; it also has 'b'$"):
        data.load_text(str(path), 8, vocabulary="ac")


# Tokenizers


def write_tokenizer(folder: Path, **changes: object) -> Path:
    """A tokenizer.json of three words that pads to 32 and truncates to 2, with changes."""
    pytest.importorskip("tokenizers", reason="needs the extra 'text': tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"the": 0, "fox": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=32)
    tokenizer.enable_truncation(2)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}))
    return folder


def test_padding_and_truncation_of_a_file_are_not_obeyed(tmp_path: Path) -> None:
    """Neither training nor a prompt pads or truncates."""
    tokenizer = text.read_tokenizer(write_tokenizer(tmp_path))
    assert text.encode(tokenizer, "the fox the dog") == [0, 1, 0, 2] == text.tokens_of(tokenizer, "the fox the dog")
    (tmp_path / "text.txt").write_text("the fox " * 50)
    read = tokens.load_tokens(str(tmp_path / "text.txt"), tmp_path, 3, 4)
    assert len(read.train) + len(read.val) == 100 and read.encode("the fox the dog") == [0, 1, 0, 2]


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}


def test_a_panic_of_the_library_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A BaseException, with a traceback on the process's own stderr."""
    folder = write_tokenizer(tmp_path, normalizer=CHARSMAP)
    tokenizer = text.read_tokenizer(folder)
    with pytest.raises(BaseException, match="index out of bounds") as caught:
        tokenizer.encode("the fox")
    assert not isinstance(caught.value, Exception), "the library still panics"
    assert "panicked" in capfd.readouterr().err
    for call in (lambda: text.encode(tokenizer, "the fox"), lambda: text.tokens_of(tokenizer, "the fox")):
        with pytest.raises(
            ValueError, match=r"^tokenizer\.json: cannot encode this text \(index out of bounds"
        ) as told:
            call()
        assert "\n" not in str(told.value)
    (tmp_path / "text.txt").write_text("the fox " * 50)
    with pytest.raises(ValueError, match="cannot encode"):
        tokens.load_tokens(str(tmp_path / "text.txt"), folder, 3, 4)
    assert capfd.readouterr() == ("", "")
    print("still", flush=True)
    os.write(2, b"here")
    assert capfd.readouterr() == ("still\n", "here"), "stderr is back"


def test_ctrl_c_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt), text._no_panic("x"):
        raise KeyboardInterrupt


NO_TOKENIZERS = [{"model": None}, {"model": {"type": "BPE"}}, {"truncation": 5}, {"padding": []}, {"normalizer": {}}]


@pytest.mark.parametrize("change", NO_TOKENIZERS)
def test_what_is_no_tokenizer_is_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: must be a tokenizer of the tokenizers library") as caught:
        text.read_tokenizer(write_tokenizer(tmp_path, **change))
    assert "\n" not in str(caught.value)


# Files of tokens


def a_config(path: Path, **changes: object) -> TrainConfig:
    settings = ModelSettings(block_size=4, model_dim=8, num_heads=2, num_layers=1, num_experts=2)
    return TrainConfig(data=str(path), model=settings, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_nanogpt_s_files_are_tokens_when_said_so(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "train.bin"
    array = np.arange(65, dtype=dtype)
    array.astype(array.dtype.newbyteorder("<")).tofile(path)
    with pytest.raises(ValueError, match="--data-dtype uint16"):
        read_task(a_config(path))
    task = read_task(a_config(path, data_dtype=dtype))
    np.testing.assert_array_equal(np.concatenate([task.text.train, task.text.val]), array)
    assert task.about["vocab_size"] == 65 and task.text.size == "65 kinds of tokens"
    assert (
        task.text.encode("3 14") == [3, 14] and task.text.encode("\n") == [58] and "vocabulary" not in task.text.about()
    )
    np.save(tmp_path / "train.npy", array)
    again = read_task(a_config(tmp_path / "train.npy"))
    np.testing.assert_array_equal(again.text.train, task.text.train)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"must be a file of {dtype} tokens, . bytes each; it has"):
        read_task(a_config(path, data_dtype=dtype))


def write_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.arange(9))


def write_header(path: Path, header: str) -> None:
    raw = header.encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw)


def a_header(size: str) -> str:
    return f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({size},)}}"


NUMPY_FILES = {
    "an archive": (write_archive, "is an archive (.npz)"),
    "objects": (lambda path: np.save(path, np.array([{}, {}]), allow_pickle=True), "holds Python objects"),
    "a square by columns": (
        lambda path: np.save(path, np.ones((3, 3), int, order="F")), "must hold one axis of integers"
    ),
    "floats": (lambda path: np.save(path, np.ones(9)), "must hold one axis of integers"),
    "flags": (lambda path: np.save(path, np.ones(9, bool)), "must hold one axis of integers"),
    "no header": (lambda path: path.write_bytes(b"\x93NUMPY"), "must be a readable .npy file"),
    "an endless header": (lambda path: write_header(path, "(" * 60_000), "must be a readable .npy file"),
    "a size of no machine": (lambda path: write_header(path, a_header("1000000000000000")), "it is cut short"),
    "a negative size": (lambda path: write_header(path, a_header("-3")), "must have sizes of at least 0"),
    "nothing": (lambda path: path.write_bytes(b""), "must be a readable .npy file"),
    "empty": (lambda path: np.save(path, np.ones(0, int)), "must be longer"),
    "negative": (lambda path: np.save(path, np.full(99, -1)), "token -1: must be 0 to"),
    "beyond 32 bits": (lambda path: np.save(path, np.full(99, 2**40)), "must be"),
    "a folder": (lambda path: path.mkdir(), "it is no file"),
    "a pipe": (lambda path: os.mkfifo(path), "it is no file"),
}


@pytest.mark.parametrize("name", NUMPY_FILES)
def test_a_file_that_holds_no_tokens_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.npy"
    write, said = NUMPY_FILES[name]
    write(path)
    with pytest.raises(ValueError) as caught:
        read_task(a_config(path))
    told = "bytes of memory" if name == "beyond 32 bits" else said
    assert told in str(caught.value) and (told != said or str(caught.value).startswith(f"data='{path}'"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_tokens_in_another_byte_order_are_the_same(tmp_path: Path) -> None:
    for kind in ("<i4", ">i4", "<u8", ">u2"):
        np.save(tmp_path / "x.npy", (np.arange(200) % 60).astype(kind))
        task = read_task(a_config(tmp_path / "x.npy"))
        batch = data.batch(task.text, 0, "train", 0, 4, 4)
        assert batch.dtype == np.int32 and (np.diff(batch) % 60 == 1).all()
