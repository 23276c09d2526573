"""The progress that a run shows: a bar on a terminal, lines elsewhere."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Meter:
    """Measures training tokens per second, without evaluations, checkpoints and compilation."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts measuring anew."""
        self.tokens, self.seconds, self._since = 0, 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stops the clock."""
        self.seconds, self._since = self.elapsed(), None

    def resume(self) -> None:
        """Starts the clock again."""
        self._since = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def rate(self) -> float | None:
        """Tokens per second; None before the first token."""
        return self.tokens / self.elapsed() if self.tokens else None

    _since: float | None


class Display(Protocol):
    """Receives the progress of a run."""

    def __enter__(self) -> "Display": ...
    def __exit__(self, *error: object) -> None: ...

    def show(self, step: int, loss: float, rate: float | None) -> None:
        """Shows that `step` steps are done."""

    def line(self, text: str) -> None:
        """Prints a line that stays on the screen."""


class Bar:
    """A rich progress bar with loss, tokens/s and time left."""

    def __init__(self, console: Console, start: int, steps: int):
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(), TextColumn("left"),
        )
        self._bar = RichProgress(*columns, console=console)
        self._task = self._bar.add_task("train", total=steps, completed=start, loss="-", rate="-")

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: int, loss: float, rate: float | None) -> None:
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", rate="-" if rate is None else f"{rate:,.0f}")

    def line(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)


class Lines:
    """Prints lines, flushed one by one, and no bar."""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, step: int, loss: float, rate: float | None) -> None:
        pass

    def line(self, text: str) -> None:
        print(text, flush=True)


class Silent(Lines):
    """Shows nothing: of several processes only the first prints."""

    def line(self, text: str) -> None:
        pass


def display(start: int, steps: int) -> Display:
    """A bar if stdout is a terminal, else lines."""
    console = Console()
    return Bar(console, start, steps) if console.is_terminal else Lines()


def clock(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
