"""What comes from outside is judged before it is believed: JSON text, sizes against the machine's memory, words in messages.

Standard library only. Every refusal is a ValueError of one line that says where, what and what is allowed.
"""

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64_000_000  # the index of the largest public checkpoint has 8 million
MAX_WORDS = 120  # characters of a stranger's text in one of our messages
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def shorten(value: object, most: int = MAX_WORDS) -> str:
    """The text of a value on one line, its middle left out where it is longer than `most` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"


def parse_json(text: str | bytes, where: object) -> Any:
    """Python's value of a JSON text. Raises ValueError "where: must be JSON (...)" for all that cannot be read.

    Nesting that exceeds the parser's, whole numbers beyond the range of a double and bytes that are not UTF-8 are refused.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"{where}: must be JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{where}: must be JSON ({shorten(error)})") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """`parse_json` of a file. Raises ValueError for a file that cannot be read or is too large; FileNotFoundError passes."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{path}: must be JSON of at most {max_bytes:,} bytes, has {size:,}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(data, path)


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """`read_json` of a file that must hold one JSON object."""
    values = read_json(path, max_bytes)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a JSON object, is {shorten(json.dumps(values), 40)}")
    return values


def available_memory() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    found = [value for value in (_free_of_machine(), _left_of_group()) if value is not None]
    return min(found) if found else None


def require_memory(needed: int, what: str) -> None:
    """Raises ValueError if `what` would need more bytes than are available."""
    have = available_memory()
    if have is not None and needed > have:
        raise ValueError(f"{what} needs about {needed:,} bytes of memory: must be at most {have:,}, which are available")


def _whole(digits: str) -> int:
    value = int(digits)
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{shorten(digits, 24)} is beyond the range of numbers") from None
    return value


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
