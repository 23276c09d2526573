"""A run: read, check, train with evaluations and checkpoints, then plots and a sample. No framework is named here."""

import dataclasses
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe.config.checks import require
from jax_moe.locks import Lock
from jax_moe.output import any_encoding
from train.ahead import check_disk, check_end
from train.configs.adapt import EXPLICIT, Free
from train.configs.settings import TrainConfig, check, flat
from train.data import text as data
from train.data.tokens import Tokens
from train.learners.learner import Learner
from train.learners.longer import lengthened
from train.options import read_settings
from train.plots import plot_run
from train.run import folder as run_folder
from train.run import metrics
from train.run.interrupt import Interrupt
from train.run.logger import Logger, check_logger, open_logger
from train.run.progress import Display, Meter, clock, display
from train.task import make_learner, read_task

SHOW_EVERY = 10  # steps between looks at the loss, so that the device never waits for us
INTERRUPTED = 130
COMPILING = "compiling: seconds for a small model, minutes for a large one"


class DivergedError(Exception):
    """The loss is no longer a number."""


@dataclass
class Run:
    """A run about to train."""

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
        """One more line to show at the start."""
        self.note = "\n".join(line for line in (self.note, note) if line) or None


def prepare(config: TrainConfig, saved: TrainConfig | None, folder: Path, free: Free = EXPLICIT) -> Run:
    """Everything that can be wrong with a request is found here, as ValueError, before anything is written."""
    check(config)
    check_logger(config)
    known = None
    if saved is not None:
        run_folder.check_same(config, saved, folder)
        known = run_folder.read_known(folder, saved)
    task = read_task(config, free, known)
    config, text = task.config, task.text
    about = {"model": task.about, "parameters": None, "text": text.about()}
    check_end(config, task, folder)
    if saved is None:
        folder, lock = run_folder.claim(folder, numbered=config.out is None)
    else:
        digest = known.sha256 if known and known.sha256 else ""
        told = f"the text that {folder} was trained on, wherever it lies (sha256 {digest[:12]}...)"
        require(digest == text.sha256, "data", text.source, told)
        lock = run_folder.lock_run(folder)
    config = dataclasses.replace(config, out=str(folder))
    try:
        learner = make_learner(config, task)
        check_disk(config, learner.num_parameters, folder)
        run = Run(config, folder, text, learner, 0, [], lock, task.note)
        if saved is not None:
            _restore(run)
            run.add_note(lengthened(config, saved, run.start))
        run_folder.write_config(folder, config, {**about, "parameters": learner.num_parameters})
    except BaseException:
        run_folder.release(folder, lock)
        raise
    return run


def _restore(run: Run) -> None:
    """Puts the run where its newest checkpoint was; at the start if it ended before the first."""
    if run_folder.never_saved(run.folder, run.config):
        run.add_note(f"{run.folder} has no checkpoint yet: it starts over at step 0")
        run.rows = metrics.keep_until(run.folder, -1)
        return
    run.start, settings = run.learner.restore(run.folder / "checkpoints")
    run_folder.check_same(run.config, run_folder.from_flat(settings), run.folder / "checkpoints")
    run.rows = metrics.keep_until(run.folder, run.start)


def train(run: Run) -> int:
    """Trains to the end or to a signal; the exit code."""
    config, logger = run.config, open_logger(run.folder, run.config)
    with Interrupt() as stop, display(run.start, config.steps) as show:
        learner, text = run.learner, run.text
        show.line(f"{run.folder}: {learner.num_parameters:,} parameters, {learner.device}, {text.source}, {text.size}")
        if run.note:
            show.line(run.note)
        if learner.compiles and run.start < config.steps:
            show.line(COMPILING)
        done = _steps(run, logger, stop, show)
    logger.close(finished=done == config.steps)
    if done < config.steps:
        if config.pretrained is not None:
            run.learner.write(run.folder)
        print(f"stopped and saved at step {done} of {config.steps}; to go on: {resume_command(run.folder)}", flush=True)
        return INTERRUPTED
    finish(run)
    return 0


def resume_command(folder: Path) -> str:
    """What the user types to continue."""
    return f"python {shlex.quote(sys.argv[0])} --resume --out {shlex.quote(str(folder))}"


def _steps(run: Run, logger: Logger, stop: Interrupt, show: Display) -> int:
    """The loop; how many steps the run has done, all of them saved."""
    config, learner, meter = run.config, run.learner, Meter()
    evaluated = {row["step"] for row in run.rows}
    saved, loss = run.start if run.start else -1, None
    for step in range(run.start, config.steps + 1):
        if (step % config.eval_every == 0 or step == config.steps) and step not in evaluated:
            meter.pause()
            row = evaluate(run, step, meter.rate(), stop)
            if row is not None:
                run.rows.append(row)
                metrics.append(run.folder, row)
                logger.log(row)
                show.line(describe(row, meter, config))
            meter.clear()
        if step == config.steps or stop.requested:
            break
        previous, loss = loss, learner.train_step(step, run.batch("train", step))
        if previous is None:
            float(loss)  # compilation is over
            meter.clear()
        else:
            meter.tokens += config.batch_size * config.model.block_size
            if step % SHOW_EVERY == 0:
                show.show(step, float(previous), meter.rate())
        due = (step + 1) % config.checkpoint_every == 0
        if due or step + 1 == config.steps or (step + 1) % config.eval_every == 0 or stop.requested:
            _finite(float(loss), step)  # also waits, so that the meter counts whole steps
            show.show(step + 1, float(loss), meter.rate())
        if due or step + 1 == config.steps:
            meter.pause()
            learner.save(run.folder / "checkpoints", step + 1, flat(config))
            saved = step + 1
            _check_there(run)
            meter.resume()
    if saved != step:
        learner.save(run.folder / "checkpoints", step, flat(config))
    _check_there(run)
    return step


def evaluate(run: Run, step: int, rate: float | None, stop: Interrupt) -> metrics.Row | None:
    """A row of metrics, or None if a signal came: the evaluation is then done again on resuming."""
    config, results = run.config, {}
    last = step == config.steps and config.final_eval_batches is not None
    number = config.final_eval_batches if last else config.eval_batches
    for use in ("eval_train", "eval_val"):
        batches = (run.batch(use, step, i) for i in range(number or 0) if not stop.requested)
        results[use] = run.learner.evaluate(step, use, batches)
    if stop.requested:
        return None
    _finite(results["eval_train"].loss, step)
    return metrics.make_row(step, results["eval_train"], results["eval_val"], rate)


def _finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"step {step}: the loss is {loss}; a lower learning_rate or clip_norm=1.0 may help")


def describe(row: metrics.Row, meter: Meter, config: TrainConfig) -> str:
    """The evaluation in one line."""
    text = f"step {row['step']}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}"
    rate = meter.rate()
    if rate is None:
        return text
    left = (config.steps - row["step"]) * config.batch_size * config.model.block_size / rate
    return f"{text} ({rate:,.0f} tokens/s, {clock(left)} left)"


def finish(run: Run) -> None:
    """Plots, the trained model, and a sample, printed and saved."""
    config, folder = run.config, run.folder
    plot_run(folder, run.rows)
    run.learner.write(folder)
    tokens = run.learner.sample(run.text.encode(config.sample_prompt), config.sample_length, config.sample_temperature)
    sample = run.text.decode(tokens)
    metrics.write_whole(folder / "sample.txt", sample + "\n")
    _check_there(run)
    print(f"\n{sample}\n\nwrote {folder}", flush=True)


def main() -> int:
    """The command; its exit code. What is wrong with a request, and what ends a run early, is one line on stderr."""
    any_encoding()
    run = None
    try:
        try:
            run = prepare(*read_settings(sys.argv[1:]))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return train(run)
    except (DivergedError, OSError) as error:
        print(f"error: {_told(error, run)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = f"; {run_folder.what_is_saved(run.folder)}" if run else ""
        print(f"stopped at once, nothing more was saved{saved}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if run:
            run.lock.release()


def _check_there(run: Run) -> None:
    """Raises OSError if the run's folder is not the one that it claimed."""
    if run.lock.lost():
        raise OSError(f"out={str(run.folder)!r}: was removed or replaced while the run wrote to it")


def _told(error: Exception, run: Run | None) -> str:
    """One line: what failed, and what is safe."""
    reason = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or (run.folder if run else "the output")
        reason = f"{where}: cannot be written ({error.strerror})"
    if run is None:
        return reason
    if run.lock.lost():
        return f"out={str(run.folder)!r}: was removed or replaced while the run wrote to it"
    return f"{reason}; {run_folder.what_is_saved(run.folder)}"
