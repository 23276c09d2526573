"""metrics.jsonl: one line an evaluation, the same keys for both frameworks."""

import json
import os
from pathlib import Path
from typing import Any

from train.learner import Evaluation

FILE = "metrics.jsonl"
Row = dict[str, Any]


def make_row(step: int, train: Evaluation, val: Evaluation, tokens_per_second: float | None) -> Row:
    """One line. Routing statistics are those of the training split; lists run over layers, then experts."""
    return {
        "step": step,
        "train_loss": train.loss,
        "val_loss": val.loss,
        "dropped_fraction": train.dropped_fraction_L,
        "expert_load": train.expert_load_LE,
        "router_entropy": train.router_entropy_L,
        "load_balance_loss": train.load_balance_loss_L,
        "tokens_per_second": tokens_per_second,
    }


def append(folder: Path, row: Row) -> None:
    """Adds a line."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path) -> list[Row]:
    """All rows; a last line cut short by a crash is left out. Raises ValueError if there is no such file or it is broken."""
    path = folder / FILE
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be a readable metrics file ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path}: line {number} must be a JSON object with a step") from None
    return rows


def keep_until(folder: Path, step: int) -> list[Row]:
    """Drops rows after `step`, which a resumed run writes again; the rows that stay."""
    rows = [row for row in read(folder) if row["step"] <= step] if (folder / FILE).exists() else []
    write_whole(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside, then renames it, so that it is never half there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
