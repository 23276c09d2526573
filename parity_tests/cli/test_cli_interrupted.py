"""`jax-moe port` interrupted, killed or run twice at once: what it leaves, and how it goes on."""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jax_moe
from jax_moe.locks import alone
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from moe_cli import generate
from moe_cli.main import main
from parity_tests.cli.commands import PORT, command, fails, interrupt, names, run, same_folders, stop_before


def test_interrupted_and_resumed(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, target, part = tmp_path / "expected", tmp_path / "target", tmp_path / ".target.part"
    run(capsys, "port", whole, expected, *PORT)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(3, interrupt, patch)
        assert main(["port", str(whole), str(target), *PORT]) == 130
    assert capsys.readouterr().err == (
        f"jax-moe: interrupted: 2 finished shards wait in {part}: the same command goes on from there\n"
    )
    assert not target.exists()
    assert "2 left by an interrupted port" in run(capsys, "port", whole, target, *PORT)
    same_folders(target, expected)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {
        f.name: f.read_bytes() for f in expected.iterdir()
    }
    assert names(tmp_path) == {"expected", "target"}


def test_interrupted_before_anything_is_there(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_before(1, interrupt, patch)
        assert main(["port", str(whole), str(tmp_path / "target"), *PORT]) == 130
    assert capsys.readouterr().err == "jax-moe: interrupted\n" and names(tmp_path) == set()


def test_a_finished_shard_that_changed_is_written_again(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    with pytest.MonkeyPatch.context() as patch:
        stop_before(3, interrupt, patch)
        assert main(["port", str(whole), str(target), *PORT]) == 130
    first, second = sorted((tmp_path / ".target.part" / "target").glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-3])
    second.write_bytes(second.read_bytes()[:-1] + b"\x77")
    capsys.readouterr()
    assert "left by an interrupted port" not in run(capsys, "port", whole, target, *PORT)
    run(capsys, "port", whole, tmp_path / "expected", *PORT)
    same_folders(target, tmp_path / "expected")


@pytest.mark.parametrize("change", ["source", "dtype"])
def test_what_does_not_match_starts_afresh(
    change: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, arguments = tmp_path / "target", list(PORT)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(3, interrupt, patch)
        assert main(["port", str(folder), str(target), *arguments]) == 130
    capsys.readouterr()
    if change == "source":
        file = sorted(folder.glob("*.safetensors"))[0]
        state = read_safetensors(file)
        state[next(iter(state))] += 1
        write_safetensors(file, state)
    else:
        arguments[-1] = "bfloat16"
    assert main(["port", str(folder), str(target), *arguments]) == 0
    streams = capsys.readouterr()
    assert "starting afresh" in streams.err and streams.err.count("\n") == 1 and "left by" not in streams.out
    run(capsys, "port", folder, tmp_path / "expected", *arguments)
    same_folders(target, tmp_path / "expected")


def test_killed_and_resumed(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process is gone without a word; its lock with it."""
    before = "import os, signal, pytest\nfrom parity_tests.cli.commands import stop_before\n"
    before += "stop_before(3, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())"
    done = command("port", whole, tmp_path / "target", *PORT, before=before)
    assert done.returncode == -signal.SIGKILL and names(tmp_path) == {".target.part", ".target.lock"}
    assert "2 left by an interrupted port" in run(capsys, "port", whole, tmp_path / "target", *PORT)
    assert names(tmp_path) == {"target"} and jax_moe.load_pretrained(tmp_path / "target")


def test_a_port_to_orbax_clears_what_an_interrupted_port_left(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The finished shards are of no use any more; a folder of that name that is not a port's stays."""
    with pytest.MonkeyPatch.context() as patch:
        stop_before(3, interrupt, patch)
        assert main(["port", str(whole), str(tmp_path / "target"), *PORT]) == 130
    capsys.readouterr()
    (tmp_path / ".other.part").mkdir()
    (tmp_path / ".other.part" / "notes.txt").write_text("mine")
    assert names(tmp_path) == {".target.part", ".other.part"}
    for target in ("target", "other"):
        run(capsys, "port", whole, tmp_path / target, "--to", "orbax")
    assert names(tmp_path) == {"target", "other", ".other.part"}


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_two_at_once(to: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One lock for every form that a target may get."""
    with alone(tmp_path / "target"):
        said = fails(capsys, "port", whole, tmp_path / "target", "--to", to)
        assert "target: is being written by another process" in said
    assert names(tmp_path) == set()
    run(capsys, "port", whole, tmp_path / "target", "--to", to)
    assert names(tmp_path) == {"target"}


AGAIN_AND_AGAIN = """
import os, signal, threading, time, pytest
from parity_tests.cli.commands import stop_before
signal.signal(signal.SIGINT, signal.default_int_handler)
def press():
    for _ in range(6):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
stop_before(3, lambda: (threading.Thread(target=press).start(), time.sleep(9)), pytest.MonkeyPatch())
"""


def test_a_port_interrupted_again_and_again(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = command("port", whole, tmp_path / "target", *PORT, before=AGAIN_AND_AGAIN)
    assert done.returncode == 130 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("jax-moe: interrupted")
    assert names(tmp_path) <= {".target.part", ".target.lock"}
    run(capsys, "port", whole, tmp_path / "target", *PORT)
    assert names(tmp_path) == {"target"} and jax_moe.load_pretrained(tmp_path / "target")


def test_a_text_interrupted_twice(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second Ctrl-C comes while the first is answered."""

    def interrupted(model: object, tokens: object, *, callback: Callable[[int, np.ndarray], None], **_: object) -> None:
        callback(0, np.asarray([5]))
        try:
            interrupt()
        finally:
            interrupt()

    monkeypatch.setattr(generate, "continue_text", interrupted)
    assert main(["generate", str(whole), "--tokens", "1,2"]) == 130
    streams = capsys.readouterr()
    assert streams.out == "1,2,5" and streams.err == "jax-moe: interrupted\n" and names(tmp_path) == set()
