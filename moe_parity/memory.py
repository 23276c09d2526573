"""Whether both sides fit into memory, said before anything is loaded."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
# Copies of the weights at the worst moment, an estimate: one side's weights and room to load them; with gradients theirs,
# which wait, and our weights, gradients and the gradients again under their names.
COPIES = {False: 2, True: 5}


def needed(parameters: int, itemsize: int, stored_bytes: int, grads: bool) -> int:
    """Bytes at the worst moment: the checkpoint twice while it is compared with its file, or what a side holds in the run."""
    return max(2 * stored_bytes, COPIES[grads] * parameters * itemsize)


def available() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    found = [value for value in (_free_of_machine(), _left_of_group()) if value is not None]
    return min(found) if found else None


def check_memory(parameters: int, itemsize: int, stored_bytes: int, grads: bool) -> None:
    """Raises ValueError, one line, if the comparison would not fit."""
    need, have = needed(parameters, itemsize, stored_bytes, grads), available()
    if have is not None and need > have:
        advice = [word for word, useful in (("--dtype float32", itemsize > 4), ("no --grads", grads)) if useful]
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
