"""A disk that is full or read-only while a run writes: one line, a non-zero exit status, and nothing is lost."""

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe.config.models import MakeMoEConfig
from jax_moe.models.makemoe import MakeMoE
from moe_train import loop
from moe_train.run import checkpoint, metrics
from moe_train.run import folder as run_folder
from parity_tests import samples
from parity_tests.cli.commands import names
from parity_tests.shared.filled import filled
from parity_tests.train.test_train_run import SETTINGS, CountingLearner, a_run

pytestmark = pytest.mark.usefixtures("quick")
FULL = "cannot be written (File too large)"


class Disk:
    """The disk, as this process sees it."""

    def __init__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, most_bytes: int) -> None:
        """Prevents files from growing beyond that size."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, self.before[1]))

    def free(self) -> None:
        """Removes the limit."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.free()


Ends = Callable[[loop.Run], str]


@pytest.fixture
def ends_in_one_line(disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ends:
    """Runs the command's main for a prepared run, which must end with status 1; returns its one line on stderr."""

    def call(run: loop.Run) -> str:
        monkeypatch.setattr(loop, "read_settings", lambda arguments: ())
        monkeypatch.setattr(loop, "prepare", lambda: run)
        status, error = loop.main(), capsys.readouterr().err
        disk.free()
        assert status == 1 and error.startswith("error: ") and error.count("\n") == 1, (status, error)
        return error

    return call


def test_plots(tmp_path: Path, disk: Disk, ends_in_one_line: Ends) -> None:
    """The last checkpoint is written before the plots, and no partial picture is left."""
    run = a_run(tmp_path / "run")
    assert isinstance(run.learner, CountingLearner)
    run.learner.on_step = lambda step: disk.fill(5000) if step == 9 else None
    error = ends_in_one_line(run)
    assert f"{run.folder / 'loss.png'}: {FULL}" in error
    assert (
        run.learner.saved == [4, 8, 10] and len(metrics.read(run.folder)) == 5 and names(run.folder) == {metrics.FILE}
    )


def test_the_trained_model(tmp_path: Path, disk: Disk, ends_in_one_line: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "plot_run", lambda folder, rows: disk.fill(20))
    run = a_run(tmp_path / "run")
    assert f"{run.folder / 'model.safetensors'}: {FULL}" in ends_in_one_line(run) and names(run.folder) == {
        metrics.FILE
    }


def test_a_run_in_pytorch(tmp_path: Path, disk: Disk, ends_in_one_line: Ends) -> None:
    """The previous checkpoint is whole and named, and the run continues from it."""
    pytest.importorskip("torch", reason="trains in PyTorch")
    from moe_train.learners.torch_learner import TorchLearner

    model = MakeMoEConfig(
        vocab_size=30, block_size=4, model_dim=16, num_heads=1, num_layers=1, num_experts=2, top_k=1,
        capacity_factor=None,
    )

    class Learner(TorchLearner):
        def train_step(self, step: int, tokens_BT1: Any) -> Any:
            if step == 5:
                disk.fill(10_000)
            return super().train_step(step, tokens_BT1)

    run = a_run(tmp_path / "run", framework="torch")
    run.learner = Learner(run.config, model, filled(lambda: MakeMoE(model, rngs=nnx.Rngs(0))))
    error = ends_in_one_line(run)
    checkpoints = run.folder / "checkpoints"
    assert f"{checkpoints / '.8.pt.part'}: cannot be written (" in error
    assert "the last checkpoint is of step 4, in " in error
    assert names(checkpoints) == {"4.pt"} and run.learner.restore(checkpoints)[0] == 4


def test_mlflow(tmp_path: Path, disk: Disk, ends_in_one_line: Ends) -> None:
    """The disk is full during the set-up, or at a later evaluation."""
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    run = a_run(tmp_path / "early", logger="mlflow")
    disk.fill(10_000)
    error = ends_in_one_line(run)
    assert "logger='mlflow': cannot be written (" in error and "no checkpoint was saved" in error
    run = a_run(tmp_path / "late", logger="mlflow")
    assert isinstance(run.learner, CountingLearner)
    run.learner.on_step = lambda step: disk.fill(10_000) if step == 4 else None
    assert "logger='mlflow': cannot be written (disk I/O error)" in ends_in_one_line(run)
    assert run.learner.saved == [4] and [row["step"] for row in metrics.read(run.folder)] == [0, 3, 6]


class ReadOnly:
    """A folder on a read-only file system, as Python's own calls see it."""

    WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
    folder: str | None = None

    def __init__(self) -> None:
        sys.addaudithook(self._hook)  # it cannot be removed, and does nothing without a folder

    def _hook(self, event: str, about: tuple[Any, ...]) -> None:
        if self.folder is None or not about or not os.path.abspath(str(about[0])).startswith(self.folder):
            return
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        if event in self.WRITES or (event == "open" and isinstance(about[2], int) and about[2] & writes):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(about[0]))


@pytest.fixture(scope="module")
def hook() -> ReadOnly:
    return ReadOnly()


@pytest.fixture
def read_only(hook: ReadOnly, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Makes the test's folder read-only until the test ends."""
    yield lambda: setattr(hook, "folder", str(tmp_path))
    hook.folder = None


def test_a_folder_that_may_only_be_read(
    tmp_path: Path, read_only: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new run and a resumed run are refused; a finished run is still read."""
    shutil.copytree(Path(samples.__file__).parent / "v0_1_0", tmp_path / "samples")
    monkeypatch.chdir(tmp_path / "samples")
    before = digest(tmp_path)
    read_only()
    with pytest.raises(OSError, match="Read-only file system"):  # otherwise the test would check nothing
        (tmp_path / "file").write_text("x")
    for words, out in (("--resume --out run_stopped", "run_stopped"), (f"{SETTINGS} --out new", "new")):
        monkeypatch.setattr(sys, "argv", ["train/train.py", *words.split()])
        assert loop.main() == 2
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1 and f"{out}': must be a folder that can be written (Read-only file system)" in error
        )
    assert jax_moe.load("run_finished").config.num_layers >= 1
    assert digest(tmp_path) == before


def digest(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_that_becomes_read_only(tmp_path: Path, read_only: Callable[[], None], ends_in_one_line: Ends) -> None:
    """As after a disk error: the previous checkpoint is whole and named."""
    run = a_run(tmp_path / "run")
    state = {"w": np.arange(3.0)}
    learner: Any = run.learner
    learner.save = lambda folder, step, settings, keep: checkpoint.save(folder, step, state, settings, keep=keep)
    learner.on_step = lambda step: read_only() if step == 6 else None
    error = ends_in_one_line(run)
    checkpoints = run.folder / "checkpoints"
    assert "cannot be written (Read-only file system); the last checkpoint is of step 4, in " in error
    assert run_folder.saved_steps(run.folder) == [4]
    checkpoint.check_whole(checkpoints, 4)
