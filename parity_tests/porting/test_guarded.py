"""Readers of input from outside: small files that made a parser's own exception reach the user."""

import asyncio
import gc
import io
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jax_moe import guarded
from jax_moe.porting.formats import orbax
from jax_moe.porting.formats.orbax import read_orbax, write_orbax


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1' + "0" * 400 + "}", "is beyond the range of numbers"),
        ('{"a": 1' + "0" * 5000 + "}", "integer string"),
        (b"\xff\xfe{}", "can't decode byte"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_json_that_cannot_be_read_is_one_line(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        guarded.parse_json(text, "here")
    message = str(caught.value)
    assert message.startswith("here: must be JSON (") and "\n" not in message and len(message) < 250


def test_numbers_that_tokenizers_really_write_are_read() -> None:
    assert guarded.parse_json('{"model_max_length": 1000000000000000019884624838656}', "") == {
        "model_max_length": int(1e30)
    }


def test_a_file_that_is_large_or_no_object_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"must be a JSON object, is \[1, 2\]"):
        guarded.read_object(file)
    with pytest.raises(ValueError, match="of at most 5 bytes, has 6"):
        guarded.read_json(file, max_bytes=5)
    with pytest.raises(FileNotFoundError):
        guarded.read_json(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read"):
        guarded.read_json(tmp_path)


def test_a_request_beyond_the_machine_says_how_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "available_memory", lambda: 1000)
    guarded.require_memory(1000, "x")
    with pytest.raises(ValueError, match="x needs about 12,000 bytes of memory: must be at most 1,000"):
        guarded.require_memory(12_000, "x")


def test_what_orbax_gives_up_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is ours alone: no warning of a coroutine that nobody awaited comes with it."""
    from orbax.checkpoint import v1 as ocp

    async def metadata() -> None:
        """Never awaited."""

    def fails(path: Path) -> None:
        metadata()
        raise KeyError("damaged")

    sums = write_orbax(tmp_path / "x", {"a": np.ones(2, np.float32)})
    monkeypatch.setattr(ocp, "checkpointables_metadata", fails)
    with warnings.catch_warnings(record=True) as shown, pytest.raises(ValueError, match="must be a whole Orbax check"):
        warnings.simplefilter("always")
        read_orbax(tmp_path / "x", sums)
    assert shown == []


def test_an_array_of_orbax_beyond_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"a.b": np.ones(300, np.float32), "c": np.ones(3, np.float32)}
    headers = read_orbax(tmp_path / "x", write_orbax(tmp_path / "x", arrays))
    monkeypatch.setattr(guarded, "available_memory", lambda: 1000)
    assert headers["c"].read().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"x: a\.b needs about 1,200 bytes"):
        headers["a.b"].read()


def test_what_nobody_awaited_is_collected_before_the_loggers_are_heard_again(caplog: pytest.LogCaptureFixture) -> None:
    """Orbax leaves unawaited tasks after an error; asyncio reports them when they are collected."""

    def fail() -> list[str]:
        with pytest.raises(OSError), orbax.quiet():
            future = asyncio.new_event_loop().create_future()
            future.set_exception(OSError("late"))
            cycle: list[Any] = [future]
            cycle.append(cycle)
            future.get_loop().close()
            del future, cycle
            raise OSError
        gc.collect()
        return [record.getMessage() for record in caplog.records]

    assert fail() == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax, "gc", SimpleNamespace(collect=lambda: None))
        assert fail() == ["Future exception was never retrieved\nfuture: <Future finished exception=OSError('late')>"]


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A .npy file with a header of our own."""
    text = header.encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def saved(value: object, how: object = np.save) -> bytes:
    file = io.BytesIO()
    how(file, value)  # type: ignore[operator]
    return file.getvalue()


HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (saved([1, 2], np.savez), "is an archive"),
        (saved(np.array([{}], object)), "must hold numbers, holds Python objects"),
        (saved(np.array(["a"])), "must hold numbers, holds <U1"),
        (b"", "does not begin as one"),
        (b"\x93NUMPY\x01", "must be a .npy file"),
        (b"\x93NUMPY\x07\x00\x02\x00{}", "must be a .npy file"),
        (npy("(" * 9000), "must be a .npy file"),
        (npy("-" * 9000 + "1"), "must be a .npy file"),
        (npy(HEADER % ("<i4", "(1000000000000,)")), "must hold 4,000,000,000,000 bytes of int32"),
        (npy(HEADER % ("<i4", "(-1, -4)"), bytes(16)), "must have sizes of at least 0"),
        (npy(HEADER % ("<i4", f"({10**400},)"), bytes(16)), "must have sizes of at least 0|must hold"),
        (npy(HEADER % ("<i4", f"(0, {10**30})")), "must have sizes of at least 0"),
        (npy(HEADER % ("V9999999999", "(1,)")), "must be a .npy file|must hold numbers"),
        (saved(np.arange(9))[:-1], "must hold 72 bytes of int64 \\[9\\], has 71: it is cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    ],
)
def test_what_is_no_npy_file_is_one_line(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    for mapped in (False, True):
        with pytest.raises(ValueError, match=said) as caught:
            guarded.read_npy(tmp_path / "x.npy", mapped=mapped)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


def test_npy_files_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    for value in (
        np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3), np.float16)), np.float32(3), np.empty((0, 2))
    ):
        np.save(tmp_path / "x.npy", value)
        for mapped in (False, True):
            again = guarded.read_npy(tmp_path / "x.npy", mapped=mapped)
            assert np.array_equal(again, value)
            assert (again.dtype, again.shape) == (np.asarray(value).dtype, np.shape(value))
    with pytest.raises(FileNotFoundError):
        guarded.read_npy(tmp_path / "none.npy")


def test_an_array_beyond_memory_is_mapped_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.arange(1000))
    monkeypatch.setattr(guarded, "available_memory", lambda: 1000)
    assert guarded.read_npy(tmp_path / "x.npy", mapped=True)[-1] == 999
    with pytest.raises(ValueError, match=r"x.npy needs about 8,000 bytes of memory: must be at most 1,000"):
        guarded.read_npy(tmp_path / "x.npy")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (guarded.read_json, guarded.read_npy):
        with pytest.raises(ValueError, match="it is no file"):
            read(tmp_path / "pipe")
