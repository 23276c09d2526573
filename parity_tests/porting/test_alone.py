"""One writer at a time: the lock, what a dead writer left, and a target that appears while another is being written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_moe.disk import writing
from jax_moe.locks import BusyError, Lock, alone, lock_of

HOLD = """
import sys, time
from pathlib import Path
from jax_moe.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BusyError):
            Lock(path)
        holder.kill()
    Lock(path).release()
    assert names(tmp_path) == set()


def test_a_lock_that_was_removed_while_another_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file opened before its holder removes it, then locked, does not count as the lock."""
    path, real = tmp_path / ".lock", os.open
    first: list[Lock] = [Lock(path)]

    def late(*arguments: int) -> int:
        descriptor = real(*arguments)  # type: ignore[arg-type]
        if first:
            first.pop().release()
        return descriptor

    monkeypatch.setattr(os, "open", late)
    second = Lock(path)
    monkeypatch.undo()
    with pytest.raises(BusyError):
        Lock(path)
    second.release()
    second.release()


def test_two_writers(tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    with writing(target, overwrite=False) as part:
        part.write_text("first")
        refused = pytest.raises(ValueError, match=r"model\.pt: is being written by another process")
        with refused, writing(target, overwrite=True) as other:
            other.write_text("second")
    assert target.read_text() == "first" and names(tmp_path) == {"model.pt"}


def test_what_dead_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.b"
    others = {".a.b.part", ".a.0123456.part.b", ".a.0123abcd.part", ".c.0123abcd.part.b"}
    for name in others:
        (tmp_path / name).write_text("theirs")
    (tmp_path / ".a.0123abcd.part.b").mkdir()
    (tmp_path / ".a.0123abcd.part.b" / "half").write_text("half")
    (tmp_path / ".a.ffffffff.part.b").write_text("half")
    lock_of(target).write_text("")
    with writing(target, overwrite=False) as part:
        part.write_text("whole")
    assert names(tmp_path) == {"a.b", *others}


def test_killed_between_moving_the_old_away_and_the_new_in(tmp_path: Path) -> None:
    """The old folder comes back before anything is decided: then it is there, and is not replaced unasked."""
    target = tmp_path / "model"
    (tmp_path / ".model.0123abcd.part.old").mkdir()
    (tmp_path / ".model.0123abcd.part.old" / "weights").write_text("old")
    with pytest.raises(ValueError, match="model: exists already"), writing(target, overwrite=False):
        pass
    assert (target / "weights").read_text() == "old" and names(tmp_path) == {"model"}


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    with pytest.raises(ValueError, match="exists already"), writing(target, overwrite=False) as part:
        part.write_text("ours")
        target.write_text("theirs")
    assert target.read_text() == "theirs" and names(tmp_path) == {"model.pt"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is locked, and nothing is removed that might be alive."""
    fcntl = pytest.importorskip("fcntl", reason="Windows locks otherwise")

    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".x.0123abcd.part").write_text("")
    with writing(tmp_path / "x", overwrite=False) as part, alone(tmp_path / "x"):
        part.write_text("whole")
    assert names(tmp_path) == {"x", ".x.0123abcd.part"}
