"""metrics.jsonl: a line per evaluation, with the same keys for both frameworks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_moe.config.checks import require, shorten
from jax_moe.disk import write_whole
from jax_moe.guarded import parse_json

FILE = "metrics.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Means over the batches of a split."""

    loss: float  # cross entropy, nats per token
    dropped_fraction_L: list[float]
    expert_load_LE: list[list[float]]
    router_entropy_L: list[float]
    load_balance_loss_L: list[float]


def make_row(step: int, train: Evaluation, val: Evaluation, tokens_per_second: float | None) -> Row:
    """A line's values. Routing statistics are those of the training split, as lists over layers, then experts."""
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
    """Appends a row to the file."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path) -> list[Row]:
    """All rows, without a last line that a crash cut short. Raises ValueError if the file is missing or damaged."""
    path = folder / FILE
    try:
        lines = [line for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be a readable metrics file ({error})") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, f"line {number}")
            _check_row(row, rows)
        except ValueError as error:
            if number < len(lines):
                what = f"line {number} must be a JSON object with a step and its numbers"
                raise ValueError(f"{path}: {what} ({error})") from None
            break
        rows.append(row)
    return rows


def _check_row(row: Any, before: list[Row]) -> None:
    """Raises ValueError unless `row` is as `make_row` makes it, with as many layers and experts as the first row."""
    require(isinstance(row, dict), "row", shorten(row, 40), "an object")
    step = row.get("step")
    require(type(step) is int and step >= 0, "step", step, "an integer of at least 0")
    for name in ("train_loss", "val_loss"):
        require(_is_number(row.get(name)), name, row.get(name), "a number")
    rate = row.get("tokens_per_second")
    require(rate is None or _is_number(rate), "tokens_per_second", rate, "null or a number")
    for name in ("dropped_fraction", "expert_load", "router_entropy", "load_balance_loss"):
        shape = _shape(row.get(name), 2 if name == "expert_load" else 1)
        same = shape is not None and (not before or shape == _shape(before[0][name], len(shape)))
        require(same, name, shorten(row.get(name), 40), "numbers by layer (and expert), as many as in the first row")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shape(value: Any, depth: int) -> tuple[int, ...] | None:
    """The shape of nested lists of numbers, of equal lengths and not empty; None for anything else."""
    if depth == 0:
        return () if _is_number(value) else None
    if not isinstance(value, list) or not value:
        return None
    shapes = {_shape(part, depth - 1) for part in value}
    inner = shapes.pop()
    return None if shapes or inner is None else (len(value), *inner)


def read_until(folder: Path, step: int) -> list[Row]:
    """The rows up to `step`."""
    return [row for row in read(folder) if row["step"] <= step] if (folder / FILE).exists() else []


def rewrite(folder: Path, rows: list[Row]) -> None:
    """Removes all other rows from the file: a resumed run writes them again."""
    write_whole(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
