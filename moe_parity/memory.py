"""Whether both sides fit into memory, said before anything is loaded."""

from pathlib import Path
from typing import Literal

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
Work = Literal["outputs", "gradients", "training"]
# Copies of the weights at the worst moment, an estimate. Outputs: one side's weights and room to load them. Gradients: theirs,
# which wait, and our weights, gradients and the gradients again under their names. Training holds both sides at once: each
# has weights, gradients and two moments, ours sums the gradients apart and keeps where it began (weights twice, moments).
COPIES: dict[Work, int] = {"outputs": 2, "gradients": 5, "training": 13}


def needed(parameters: int, itemsize: int, stored_bytes: int, work: Work) -> int:
    """Bytes at the worst moment: the checkpoint twice while it is compared with its file, or what the run holds."""
    return max(2 * stored_bytes, COPIES[work] * parameters * itemsize)


def available() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    found = [value for value in (_free_of_machine(), _left_of_group()) if value is not None]
    return min(found) if found else None


def check_memory(parameters: int, itemsize: int, stored_bytes: int, work: Work) -> None:
    """Raises ValueError, one line, if the comparison would not fit."""
    need, have = needed(parameters, itemsize, stored_bytes, work), available()
    if have is not None and need > have:
        narrower, fewer = itemsize > 4 and work != "training", work == "gradients"
        advice = [word for word, useful in (("--dtype float32", narrower), ("no --grads", fewer)) if useful]
        instead = f"; less would do with {' and '.join(advice)}" if advice else ""
        raise ValueError(
            f"not enough memory for both sides: {parameters:,} parameters need about {need / 1e9:,.1f} GB, "
            f"{have / 1e9:,.1f} GB are available{instead}"
        )


def _free_of_machine() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _left_of_group() -> int | None:
    """Of a container: its limit less what it uses, its file cache not counted."""
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max": no limit, a ValueError
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return limit - used + int(stat.get("file", 0))
