"""The checkpoints of a run: at most one is being written while the run goes on, and how long the run stood still."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moe_train.configs.settings import flat
from moe_train.prepare import Run
from moe_train.run import folder as run_folder
from moe_train.run.keep import Keep, record_best
from moe_train.run.progress import Meter
from moe_train.run.saving import Saving


@dataclass
class Saves:
    """`step` is that of the last checkpoint, which may still be being written."""

    run: Run
    meter: Meter
    step: int | None = None
    begun: int = 0
    seconds: float = 0.0  # for which training stood still
    at_end: float = 0.0  # seconds until the last was whole
    _saving: Saving | None = None
    _started: float = field(default_factory=time.perf_counter)

    def begin(self, step: int) -> None:
        """Begins to write a checkpoint, once the one before is whole. Raises OSError if either cannot be written."""
        config = self.run.config
        with self._standing():
            self._wait()
            keep = Keep(config.keep_checkpoints, self._best())
            folder = self.run.folder / "checkpoints"
            self._saving = self.run.learner.save(folder, step, flat(config), keep)
            self.step, self.begun = step, self.begun + 1
            if self._saving is None:
                self._ended()
            elif not config.async_checkpoints:
                self._wait()

    def look(self) -> None:
        """Between two steps: whether a checkpoint has become whole, or has failed."""
        if self._saving is not None and self._saving.whole():
            self._ended()

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        since = time.perf_counter()
        self._wait()
        self.at_end = time.perf_counter() - since

    def told(self) -> str:
        """How long training stood still for checkpoints, of all the time since its start."""
        whole = time.perf_counter() - self._started
        each, share = self.seconds / self.begun, self.seconds / whole
        still = f"training stood still {each:.3f} s for each, {share:.1%} of {whole:.1f} s"
        return f"checkpoints: {self.begun}; {still}; {self.at_end:.2f} s at the end until the last was whole"

    def _wait(self) -> None:
        if self._saving is not None:
            self._saving.wait()
            self._ended()

    def _ended(self) -> None:
        self._saving = None
        self.run.check_there()
        self._best()

    def _best(self) -> int | None:
        """The step of the best checkpoint, recorded before others are removed; None unless it is to be kept."""
        run = self.run
        if not run.config.keep_best:
            return None
        return run.processes.alone(lambda: record_best(run.folder, run_folder.saved_steps(run.folder), run.rows))

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """Counts the time inside, and keeps it out of the rate of training."""
        self.meter.pause()
        since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - since
            self.meter.resume()
