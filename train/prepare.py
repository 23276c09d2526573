"""A requested run is checked whole, then made ready: settings, text, output folder, learner."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe.config.checks import require
from jax_moe.locks import Lock
from train.ahead import check_disk, check_end
from train.configs.adapt import EXPLICIT, Free
from train.configs.known import Known
from train.configs.settings import TrainConfig, check
from train.data import text as data
from train.data.tokens import Tokens
from train.learners.learner import Learner
from train.learners.longer import lengthened
from train.run import folder as run_folder
from train.run import metrics
from train.run.logger import check_logger
from train.task import Task, make_learner, read_task


@dataclass
class Run:
    """A run that is ready to train. `rows` are the evaluations already written, `start` the steps already done."""

    config: TrainConfig
    folder: Path
    text: data.Text | Tokens
    learner: Learner
    start: int
    rows: list[metrics.Row]
    lock: Lock
    note: str | None = None

    def batch(self, use: data.Use, step: int, number: int = 0) -> np.ndarray:
        """Tokens [B, T + 1]."""
        config = self.config
        return data.batch(self.text, config.seed, use, step, config.batch_size, config.model.block_size, number)

    def add_note(self, note: str | None) -> None:
        """Adds a line to what is shown at the start."""
        self.note = "\n".join(line for line in (self.note, note) if line) or None

    def check_there(self) -> None:
        """Raises OSError if the folder was removed or replaced since the run claimed it."""
        if self.lock.lost():
            raise OSError(removed(self.folder))


def removed(folder: Path) -> str:
    """The message for a run whose folder is no longer its own."""
    return f"out={str(folder)!r}: was removed or replaced while the run wrote to it"


def prepare(config: TrainConfig, saved: TrainConfig | None, folder: Path, free: Free = EXPLICIT) -> Run:
    """The run that the settings describe; `saved` are those of the run to be resumed, None for a new run.

    Raises ValueError for whatever is wrong with the request, before anything is written.
    """
    check(config)
    check_logger(config)
    known = None
    if saved is not None:
        run_folder.check_same(config, saved, folder)
        known = run_folder.read_known(folder, saved)
    task = read_task(config, free, known)
    check_end(task.config, task, folder)
    folder, lock = _take_folder(task, folder, known)
    try:
        return _ready(dataclasses.replace(task.config, out=str(folder)), saved, task, folder, lock)
    except BaseException:
        run_folder.release(folder, lock)
        raise


def _take_folder(task: Task, folder: Path, known: Known | None) -> tuple[Path, Lock]:
    """The run's folder and its lock. Raises ValueError if a resumed run's text is not that of its start."""
    if known is None:
        return run_folder.claim(folder, numbered=task.config.out is None)
    text = f"the text that {folder} was trained on, at any path (sha256 {(known.sha256 or '')[:12]}...)"
    require(known.sha256 == task.text.sha256, "data", task.text.source, text)
    return folder, run_folder.lock_run(folder)


def _ready(config: TrainConfig, saved: TrainConfig | None, task: Task, folder: Path, lock: Lock) -> Run:
    """The run with its learner, restored if `saved` is given; the run's config.json is written."""
    learner = make_learner(config, task)
    check_disk(config, learner.num_parameters, folder)
    run = Run(config, folder, task.text, learner, 0, [], lock, task.note)
    if saved is not None:
        _restore(run)
        run.add_note(lengthened(config, saved, run.start))
    about = {"model": task.about, "parameters": learner.num_parameters, "text": task.text.about()}
    run_folder.write_config(folder, config, about)
    return run


def _restore(run: Run) -> None:
    """Continues from the newest checkpoint, or from step 0 if the run ended before its first checkpoint."""
    if run_folder.never_saved(run.folder, run.config):
        run.add_note(f"{run.folder} has no checkpoint yet: it starts over at step 0")
        run.rows = metrics.keep_until(run.folder, -1)
        return
    run.start, settings = run.learner.restore(run.folder / "checkpoints")
    run_folder.check_same(run.config, run_folder.from_flat(settings), run.folder / "checkpoints")
    run.rows = metrics.keep_until(run.folder, run.start)
