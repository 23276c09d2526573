"""A requested run is checked whole, then made ready: settings, text, output folder, learner."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe.config.checks import require
from jax_moe.locks import Lock
from moe_train.ahead import check_disk, check_end, check_export
from moe_train.configs.adapt import EXPLICIT, Free
from moe_train.configs.known import Known
from moe_train.configs.settings import TrainConfig, check, flat
from moe_train.data import text as data
from moe_train.data.tokens import Tokens
from moe_train.data.windows import Windows, check_loader
from moe_train.learners.learner import Learner
from moe_train.learners.longer import lengthened
from moe_train.run import folder as run_folder
from moe_train.run import metrics
from moe_train.run.logger import check_logger
from moe_train.run.together import ALONE, Processes
from moe_train.task import Task, make_learner, read_task


@dataclass
class Run:
    """A run that is ready to train. `rows` are the evaluations already written, `start` the steps already done.

    `share` are the sequences of a batch that this process reads, None: all. `windows` reads the batches of training
    where Grain does.
    """

    config: TrainConfig
    folder: Path
    text: data.Text | Tokens
    learner: Learner
    start: int
    rows: list[metrics.Row]
    lock: Lock | run_folder.Unlocked
    note: str | None = None
    processes: Processes = ALONE
    share: np.ndarray | None = None
    windows: Windows | None = None

    def batch(self, use: data.Use, step: int, number: int = 0) -> np.ndarray:
        """Tokens [B, T + 1], or those of this process's share."""
        config, T = self.config, self.config.model.block_size
        if use == "train" and self.windows is not None:
            return self.windows.batch(step)
        return data.batch(self.text, config.seed, use, step, config.batch_size, T, number, self.share)

    def close(self) -> None:
        """Ends the threads that read ahead."""
        if self.windows is not None:
            self.windows.close()

    def add_note(self, note: str | None) -> None:
        """Adds a line to what is shown at the start."""
        self.note = "\n".join(line for line in (self.note, note) if line) or None

    def check_there(self) -> None:
        """Raises OSError if the folder was removed or replaced since the run claimed it."""
        self.processes.alone(self._check_lock)

    def _check_lock(self) -> None:
        if self.lock.lost():
            raise OSError(removed(self.folder))


def removed(folder: Path) -> str:
    """The message for a run whose folder is no longer its own."""
    return f"out={str(folder)!r}: was removed or replaced while the run wrote to it"


def prepare(
    config: TrainConfig, saved: TrainConfig | None, folder: Path, free: Free = EXPLICIT,
    processes: Processes = ALONE,
) -> Run:
    """The run that the settings describe; `saved` are those of the run to be resumed, None for a new run.

    Raises ValueError for whatever is wrong with the request, before anything is written; AgreedError if that is so in
    any of several processes, or if they disagree.
    """
    task, known = processes.everywhere(lambda: _task(config, saved, folder, free, processes))
    said = {**flat(task.config), "data": task.text.sha256, "out": str(folder.absolute()), "resume": saved is not None}
    processes.agree({**said, **run_folder.versions()})
    taken = processes.alone(lambda: _take_folder(task, folder, known))
    folder, lock = taken or (folder, run_folder.Unlocked())
    try:
        return _ready(dataclasses.replace(task.config, out=str(folder)), saved, task, folder, lock, processes)
    except BaseException:
        run_folder.release(folder, lock)
        raise


def _task(
    config: TrainConfig, saved: TrainConfig | None, folder: Path, free: Free, processes: Processes
) -> tuple[Task, Known | None]:
    """What is to be trained, checked by this process alone, and what a resumed run records of its text."""
    check(config)
    check_logger(config)
    check_loader(config.data_loader)
    several = processes.count > 1
    require(not several or config.framework == "jax", "framework", config.framework, "'jax' with several processes")
    known = None
    if saved is not None:
        run_folder.check_same(config, saved, folder)
        known = run_folder.read_known(folder, saved)
    task = read_task(config, free, known)
    check_end(task.config, task, folder)
    return task, known


def _take_folder(task: Task, folder: Path, known: Known | None) -> tuple[Path, Lock]:
    """The run's folder and its lock. Raises ValueError if a resumed run's text is not that of its start, or if the
    folder of --export cannot be written.
    """
    check_export(task.config, folder)
    if known is None:
        return run_folder.claim(folder, numbered=task.config.out is None)
    text = f"the text that {folder} was trained on, at any path (sha256 {(known.sha256 or '')[:12]}...)"
    require(known.sha256 == task.text.sha256, "data", task.text.source, text)
    return folder, run_folder.lock_run(folder)


def _ready(
    config: TrainConfig, saved: TrainConfig | None, task: Task, folder: Path, lock: Lock | run_folder.Unlocked,
    processes: Processes,
) -> Run:
    """The run with its learner, restored if `saved` is given; the run's config.json is written."""
    learner = processes.everywhere(lambda: make_learner(config, task))
    processes.alone(lambda: check_disk(config, learner.num_parameters, folder))
    share = learner.rows if processes.count > 1 else None
    run = Run(config, folder, task.text, learner, 0, [], lock, task.note, processes, share)
    if config.data_loader == "grain":
        T = config.model.block_size
        run.windows = Windows(task.text.train, config.seed, config.batch_size, T, config.steps, share)
    if saved is not None:
        _restore(run)
        run.add_note(lengthened(config, saved, run.start))
    about = {"model": task.about, "parameters": learner.num_parameters, "text": task.text.about()}
    processes.alone(lambda: run_folder.write_config(folder, config, about))
    return run


def _restore(run: Run) -> None:
    """Continues from the newest checkpoint, or from step 0 if the run ended before its first checkpoint."""
    everywhere, folder = run.processes.everywhere, run.folder
    if everywhere(lambda: run_folder.never_saved(folder, run.config)):
        run.add_note(f"{folder} has no checkpoint yet: it starts over at step 0")
        last = -1
    else:
        run.start, settings = everywhere(lambda: run.learner.restore(folder / "checkpoints"))
        saved = run_folder.from_flat(settings)
        everywhere(lambda: run_folder.check_same(run.config, saved, folder / "checkpoints"))
        last = run.start
    run.rows = everywhere(lambda: metrics.read_until(folder, last))
    run.processes.alone(lambda: metrics.rewrite(folder, run.rows))
