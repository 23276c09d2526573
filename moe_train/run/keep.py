"""Which checkpoints stay: the newest, and with `--keep-best` the one of the lowest validation loss."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jax_moe.disk import write_whole
from moe_train.run.metrics import Row

FILE = "best.json"


@dataclass(frozen=True)
class Keep:
    """The `newest` checkpoints stay, and the one of the step `best`."""

    newest: int = 2  # if the newest is damaged, the checkpoint before it is left
    best: int | None = None

    def removable(self, steps: list[int]) -> list[int]:
        """Those of `steps`, in order, whose checkpoints go."""
        return [step for step in steps[: -self.newest] if step != self.best]


KEEP = Keep()


def best_row(steps: Iterable[int], rows: Iterable[Row]) -> Row | None:
    """Of the evaluations at these steps the one with the lowest validation loss, the earlier of equal ones."""
    there = set(steps)
    rows = [row for row in rows if row["step"] in there and math.isfinite(row["val_loss"])]
    return min(rows, key=lambda row: (row["val_loss"], row["step"]), default=None)


def record_best(folder: Path, steps: Iterable[int], rows: Iterable[Row]) -> int | None:
    """Writes step and validation loss of the best checkpoint of `steps`, all whole; its step, None if there is none."""
    row = best_row(steps, rows)
    if row is None:
        (folder / FILE).unlink(missing_ok=True)  # of a run that starts over
        return None
    write_whole(folder / FILE, json.dumps({"step": row["step"], "val_loss": row["val_loss"]}) + "\n")
    return row["step"]
