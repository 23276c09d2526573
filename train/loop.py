"""A run: read, check, train with evaluations and checkpoints, then plots and a sample. No framework is named here."""

import dataclasses
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from jax_moe.guarded import never_fail_to_print, shorten
from jax_moe.porting.claim import Claim
from jax_moe.porting.files import check_space
from train import checkpoint, data, metrics, run_folder
from train.configs import PRESETS
from train.configs.settings import Start, TrainConfig, check, flat
from train.interrupt import Interrupt
from train.learner import Learner
from train.logger import Logger, check_logger, open_logger
from train.plots import plot_run
from train.progress import Display, Meter, clock, display
from train.task import make_learner, read_task
from train.tokens import Tokens

SHOW_EVERY = 10  # steps between looks at the loss, so that the device never waits for us
INTERRUPTED = 130


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
    note: str | None = None
    held: Claim | None = None  # None: the folder is this process's alone

    def check_there(self) -> None:
        """Raises OSError if the run's folder was removed or replaced since the run began."""
        if self.held is not None and not self.held.holds():
            raise OSError(f"{self.folder} was removed or replaced during the run")

    def batch(self, use: data.Use, step: int, number: int = 0) -> np.ndarray:
        """Tokens [B, T + 1]."""
        config = self.config
        return data.batch(self.text, config.seed, use, step, config.batch_size, config.model.block_size, number)


def read_settings(arguments: list[str]) -> tuple[TrainConfig, TrainConfig | None, Path | None]:
    """Settings from the command line, those of the run to be resumed, and the folder (None: the next one). Raises ValueError."""
    asks_help = {"-h", "--help"} & set(arguments)
    start, _ = tyro.cli(Start, args=arguments, add_help=False, return_unknown_args=True)
    folder = None if asks_help else run_folder.choose(start)
    saved = run_folder.read_config(folder)["config"] if start.resume and folder is not None else None
    preset = start.preset or (saved.preset if saved else "quick" if start.pretrained is None else "finetune")
    defaults = saved or PRESETS[preset or "quick"]
    defaults = dataclasses.replace(defaults, preset=preset, out=None, resume=False)
    config = tyro.cli(TrainConfig, prog="train.py", args=arguments, default=defaults, config=(tyro.conf.OmitArgPrefixes,))
    return config, saved, folder


def prepare(config: TrainConfig, saved: TrainConfig | None, chosen: Path | None) -> Run:
    """Everything that can be wrong with a request is found here, as ValueError, before anything is written."""
    check(config)
    check_logger(config)
    if saved is not None:
        run_folder.check_same(config, saved, chosen or Path())
    task = read_task(config)
    text = task.text
    text.encode(config.sample_prompt)
    about = {"model": task.about, "parameters": None, "text": text.about()}
    if saved is not None and chosen is not None:
        known = run_folder.read_config(chosen)["text"]["sha256"]
        if known != text.sha256:
            raise ValueError(f"data={text.source!r}: must be the text that {chosen} was trained on (sha256 {known[:12]}...)")
    folder, held = run_folder.claim(chosen, resume=saved is not None)
    config, note = dataclasses.replace(config, out=str(folder)), task.note
    try:
        learner = make_learner(config, task)
        check_space(folder / "checkpoints", checkpoint.DISK_COPIES * learner.num_parameters * 4)
        start, rows = 0, list[metrics.Row]()
        if saved is not None and (checkpoint.steps_of(folder / "checkpoints") or run_folder.is_finished(folder)):
            start, rows = _restore(config, learner, folder)
        elif saved is not None:
            metrics.keep_until(folder, -1)
            note = "no checkpoint was saved yet: the run starts over from step 0"
        run_folder.write_config(folder, config, {**about, "parameters": learner.num_parameters})
    except BaseException:
        run_folder.release(folder, held)
        raise
    return Run(config, folder, text, learner, start, rows, note, held)


def _restore(config: TrainConfig, learner: Learner, folder: Path) -> tuple[int, list[metrics.Row]]:
    step, settings = learner.restore(folder / "checkpoints")
    run_folder.check_same(config, run_folder.from_flat(settings), folder / "checkpoints")
    return step, metrics.keep_until(folder, step)


def train(run: Run) -> int:
    """Trains to the end or to a signal; the exit code."""
    try:
        return _train(run)
    finally:
        if run.held is not None:
            run.held.release()


def _train(run: Run) -> int:
    config, logger = run.config, open_logger(run.folder, run.config)
    with Interrupt() as stop, display(run.start, config.steps) as show:
        learner, text = run.learner, run.text
        show.line(f"{run.folder}: {learner.num_parameters:,} parameters, {learner.device}, {text.source}, {text.size}")
        if run.note:
            show.line(run.note)
        done = _steps(run, logger, stop, show)
    logger.close(finished=done == config.steps)
    if done < config.steps:
        if config.pretrained is not None:
            run.learner.write(run.folder)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is saved: a second Ctrl-C has nothing to stop
        print(f"stopped and saved at step {done} of {config.steps}; to go on: {resume_command(run.folder)}", flush=True)
        return INTERRUPTED
    finish(run)
    return 0


def resume_command(folder: Path) -> str:
    """What the user types to continue."""
    return f"python {sys.argv[0]} --resume --out {folder}"


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
                run.check_there()
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
            save(run, step + 1)
            saved = step + 1
            meter.resume()
    if saved != step:
        save(run, step)
    return step


def save(run: Run, step: int) -> None:
    """A checkpoint. Raises OSError that names the last good one where it cannot be written."""
    folder = run.folder / "checkpoints"
    try:
        run.check_there()
        run.learner.save(folder, step, flat(run.config))
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or shorten(error)
        good = [known for known in checkpoint.steps_of(folder) if known != step]
        last = f"the last good checkpoint is {folder / str(good[-1])}" if good else "no checkpoint was saved before"
        raise OSError(f"step {step} could not be saved ({reason}); {last}") from None


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
    run.check_there()
    plot_run(folder, run.rows)
    run.learner.write(folder)
    tokens = run.learner.sample(run.text.encode(config.sample_prompt), config.sample_length, config.sample_temperature)
    sample = run.text.decode(tokens)
    metrics.write_whole(folder / "sample.txt", sample + "\n")
    print(f"\n{sample}\n\nwrote {folder}", flush=True)


def main() -> int:
    """The command; its exit code. What is wrong with a request is one line on stderr."""
    never_fail_to_print()
    try:
        try:
            run = prepare(*read_settings(sys.argv[1:]))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return train(run)
    except (DivergedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once, nothing more was saved", file=sys.stderr)
        return INTERRUPTED
