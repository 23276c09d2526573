"""The training loop: steps, with evaluations and checkpoints between them. No framework is named here."""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from moe_train.configs.settings import TrainConfig
from moe_train.prepare import Run
from moe_train.run import metrics
from moe_train.run.interrupt import Interrupt
from moe_train.run.logger import Logger
from moe_train.run.progress import Display, Meter, clock
from moe_train.run.together import AgreedError
from moe_train.saves import Saves

SHOW_EVERY = 10  # steps between reads of the loss: the device need not wait for the host at every step
MEET_EVERY = 10  # steps after which several processes ask each other for signals, and whether a checkpoint is whole


class DivergedError(Exception):
    """The loss is not a finite number."""


@dataclass
class Steps:
    """A run between two steps: `step` steps are done, `loss` is the last step's."""

    run: Run
    logger: Logger
    stop: Interrupt
    display: Display
    step: int = 0
    loss: Any = None
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self.step = self.run.start
        self.saves = Saves(self.run, self.meter, self.run.start or None)

    @property
    def config(self) -> TrainConfig:
        """The run's settings."""
        return self.run.config

    def to_end(self) -> int:
        """Trains until the last step or a signal; returns the number of steps done, all of them saved.

        After an error that all processes know of, the checkpoint that is being written becomes whole, if it can.
        """
        try:
            self._to_end()
        except Exception as error:
            if self.run.processes.count == 1 or isinstance(error, AgreedError | DivergedError):
                with suppress(OSError, AgreedError):
                    self.saves.wait()
            raise
        return self.step

    def _to_end(self) -> None:
        self.evaluate()
        while self.step < self.config.steps and not self.stop.requested:
            self.train_step()
            if self.step % MEET_EVERY == 0:
                self.stop.meet()
            if self.step % MEET_EVERY == 0 or self.run.processes.count == 1:
                self.saves.look()
            self.look_at_loss()
            if self.due(self.config.checkpoint_every):
                self.saves.begin(self.step)
            self.evaluate()
        if self.saves.step != self.step:
            self.saves.begin(self.step)
        self.saves.wait()
        self.run.check_there()
        if self.saves.begun:
            self.display.line(self.saves.told())

    def due(self, every: int) -> bool:
        """Whether an action with this interval in steps is due now. All are due after the last step."""
        return self.step % every == 0 or self.step == self.config.steps

    def train_step(self) -> None:
        """One step. Its loss is read at the next step, when the device has finished it."""
        previous, self.loss = self.loss, self.run.learner.train_step(self.step, self.run.batch("train", self.step))
        self.step += 1
        if previous is None:
            float(self.loss)  # waits until the step is compiled, so that the meter does not count it
            self.meter.clear()
            return
        self.meter.tokens += self.config.batch_size * self.config.model.block_size
        if (self.step - 1) % SHOW_EVERY == 0:
            self.display.show(self.step - 1, float(previous), self.meter.rate())

    def look_at_loss(self) -> None:
        """Shows the loss before a checkpoint, an evaluation or the end. Raises DivergedError if it is not finite.

        Reading the loss also waits for the device, so that the meter counts whole steps.
        """
        if self.due(self.config.checkpoint_every) or self.due(self.config.eval_every) or self.stop.requested:
            check_finite(float(self.loss), self.step - 1)
            self.display.show(self.step, float(self.loss), self.meter.rate())

    def evaluate(self) -> None:
        """If an evaluation is due and not yet written, evaluates both splits, writes the row and shows it."""
        if not self.due(self.config.eval_every) or any(row["step"] == self.step for row in self.run.rows):
            return
        self.meter.pause()
        row = evaluate(self.run, self.step, self.meter.rate(), self.stop)
        if row is not None:
            self.run.rows.append(row)
            self.run.processes.alone(lambda: self._write(row))
            self.display.line(describe(row, self.meter, self.config))
        self.meter.clear()

    def _write(self, row: metrics.Row) -> None:
        metrics.append(self.run.folder, row)
        self.logger.log(row)


def evaluate(run: Run, step: int, rate: float | None, stop: Interrupt) -> metrics.Row | None:
    """A row of metrics; None after a signal, and the resumed run evaluates this step again."""
    config, results = run.config, {}
    last = step == config.steps and config.final_eval_batches is not None
    number = config.final_eval_batches if last else config.eval_batches
    for use in ("eval_train", "eval_val"):
        batches = (run.batch(use, step, i) for i in range(number or 0) if not stop.requested)
        results[use] = run.learner.evaluate(step, use, batches)
    if stop.requested:
        return None
    check_finite(results["eval_train"].loss, step)
    return metrics.make_row(step, results["eval_train"], results["eval_val"], rate)


def check_finite(loss: float, step: int) -> None:
    """Raises DivergedError, with what may help, unless the loss is finite."""
    if not math.isfinite(loss):
        raise DivergedError(f"step {step}: the loss is {loss}; a lower learning_rate or clip_norm=1.0 may help")


def describe(row: metrics.Row, meter: Meter, config: TrainConfig) -> str:
    """An evaluation as a line of text, with the training rate and the time left where they are known."""
    text = f"step {row['step']}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}"
    rate = meter.rate()
    if rate is None:
        return text
    left = (config.steps - row["step"]) * config.batch_size * config.model.block_size / rate
    return f"{text} ({rate:,.0f} tokens/s, {clock(left)} left)"
