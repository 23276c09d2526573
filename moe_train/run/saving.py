"""A checkpoint that is being written while the run goes on: work in a thread, and its end as all processes see it."""

import threading
from collections.abc import Callable, Sequence

from moe_train.run.together import Processes

LOOK = 0.1  # seconds after which processes that wait ask each other again


class Saving:
    """Stages of work in a thread; with several processes none begins a stage before all have ended the one before.

    The thread calls nothing that all processes must call in the same order, as the training loop does so meanwhile.
    """

    def __init__(self, stages: Sequence[Callable[[], None]], processes: Processes, undo: Callable[[], None]) -> None:
        self._stages, self._processes, self._undo = list(stages), processes, undo
        self._error: BaseException | None = None
        self._start()

    def whole(self, seconds: float = 0.0) -> bool:
        """Whether the checkpoint is whole, at the latest after so many seconds; to be called by all processes.

        Raises what ended the work, in all processes if it ended in any of them.
        """
        self._done.wait(seconds)
        said = self._processes.gather(self._state())
        if "failed" in said:
            self._undo()
            self._processes.everywhere(self._raise)
        if "running" in said:
            return False
        if self._stages:
            self._start()
            return False
        return True

    def wait(self) -> None:
        """Returns when the checkpoint is whole."""
        while not self.whole(LOOK):
            pass

    def _start(self) -> None:
        alone = self._processes.count == 1
        work, self._stages = (self._stages, []) if alone else (self._stages[:1], self._stages[1:])
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(work, self._done), name="checkpoint").start()

    def _run(self, work: Sequence[Callable[[], None]], done: threading.Event) -> None:
        try:
            for stage in work:
                stage()
        except BaseException as error:  # raised again where the run hears of it
            self._error = error
        finally:
            done.set()

    def _state(self) -> str:
        if not self._done.is_set():
            return "running"
        return "" if self._error is None else "failed"

    def _raise(self) -> None:
        if self._done.is_set() and self._error is not None:
            raise self._error
