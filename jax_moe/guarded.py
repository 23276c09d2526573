"""Checks of input from outside: JSON text, NumPy files, sizes against the memory.

Standard library and NumPy only. Every refusal is a ValueError of one line with the place, the value and what is
allowed.
"""

import json
import math
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from jax_moe.config.checks import shorten

MAX_JSON_BYTES = 64_000_000  # the largest public checkpoint's index has 8 million
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # first bytes of a file that Git LFS has not fetched yet
NPY, NPZ = b"\x93NUMPY", b"PK\x03\x04"


def parse_json(text: str | bytes, where: object, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text. Raises ValueError "where: must be JSON (...)" for a text that cannot be read.

    Refused are also nesting beyond the parser's limit, integers beyond the range of a double and bytes that are not
    UTF-8. `pairs` builds an object from its (name, value) pairs, and may refuse them.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, parse_int=_whole, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"{where}: must be JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{where}: must be JSON ({shorten(error)})") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """`parse_json` of a file. Raises ValueError for an unreadable or too large file; FileNotFoundError passes."""
    return parse_json(_json_bytes(path, max_bytes), path)


def read_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """`read_json` of a file that must hold one JSON object."""
    return read_text_and_object(path, max_bytes)[1]


def read_text_and_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> tuple[str, dict[str, Any]]:
    """The text of a file and the object of `read_object`."""
    text, values = read_text_and_json(path, max_bytes)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a JSON object, is {shorten(json.dumps(values), 40)}")
    return text, values


def read_text_and_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> tuple[str, Any]:
    """The text of a file and the value of `read_json`."""
    data = _json_bytes(path, max_bytes)
    return data.decode("utf-8", "replace"), parse_json(data, path)


def _json_bytes(path: Path, max_bytes: int) -> bytes:
    size = _size(path)
    if size > max_bytes:
        raise ValueError(f"{path}: must be JSON of at most {max_bytes:,} bytes, has {size:,}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    refuse_pointer(path, data)
    return data


def read_npy(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The array of a .npy file. With `mapped` it stays on disk and is read-only, so that it may be larger than the
    memory.

    Raises ValueError for a file that is not a .npy of numbers (an archive, a pickle, objects), for a header that
    promises more bytes than the file has, and for an array larger than the memory; FileNotFoundError passes through.
    """
    size = _size(path)
    try:
        with path.open("rb") as file:
            head = file.read(256)
            refuse_pointer(path, head)
            if head.startswith(NPZ):
                raise ValueError(f"{path}: must be a single array, is an archive (.npz): np.save writes a .npy file")
            if not head.startswith(NPY):
                raise ValueError(f"{path}: must be a .npy file as np.save writes it, does not begin as one")
            shape, fortran, dtype = _npy_header(path, file)
            begin = file.tell()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    needed = math.prod(shape) * dtype.itemsize
    if size - begin < needed:
        said = f"must hold {needed:,} bytes of {dtype} {shorten(list(shape))}"
        raise ValueError(f"{path}: {said}, has {size - begin:,}: it is cut short")
    order: Literal["F", "C"] = "F" if fortran else "C"
    if needed == 0:
        return np.empty(shape, dtype, order)
    if not mapped:
        require_memory(needed, str(path))
    view = np.asarray(np.memmap(path, dtype, mode="r", offset=begin, shape=shape, order=order))
    return view if mapped else np.array(view, order="K")


def _npy_header(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype, from the header; nothing in it is executed."""
    file.seek(0)
    try:
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)[0]
        if version not in read:
            raise ValueError(f"version {version} of the format has names of fields")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's parser warns about the text of the header
            shape, fortran, dtype = read[version](file)
    except OSError:
        raise
    except Exception as error:  # Python's parser reads the header: SyntaxError, RecursionError, MemoryError ...
        reason = shorten(error) or "empty"
        raise ValueError(f"{path}: must be a .npy file as np.save writes it (its header: {reason})") from None
    if dtype.kind not in "biufc":
        raise ValueError(f"{path}: must hold numbers, holds {'Python objects' if dtype.hasobject else shorten(dtype)}")
    if any(n < 0 for n in shape) or len(shape) > 32 or max(shape, default=0) >= 2**63:
        raise ValueError(f"{path}: must have sizes of at least 0, has {shorten(list(shape))}")
    return shape, fortran, dtype


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False for a name that the system refuses."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raises ValueError if a file begins like a Git LFS pointer."""
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{path}: is a Git LFS pointer, not the file itself: `git lfs pull` fetches the file")


def refuse_pointer_file(path: Path) -> None:
    """`refuse_pointer` for a file; an unreadable file passes, for its reader to report."""
    with suppress(OSError), path.open("rb") as file:
        refuse_pointer(path, file.read(256))


def _size(path: Path) -> int:
    """Size of a file in bytes. Raises ValueError unless it is a regular file (reading a pipe would block);
    FileNotFoundError passes through.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: cannot be read (it is no file)")
    return found.st_size


def available_memory() -> int | None:
    """Bytes of memory that this process may still allocate; None if the system does not say."""
    found = [value for value in (_free_of_machine(), _left_of_group()) if value is not None]
    return min(found) if found else None


def require_memory(needed: int, what: str) -> None:
    """Raises ValueError if `what` would need more bytes than are available."""
    have = available_memory()
    if have is not None and needed > have:
        raise ValueError(f"{what} needs about {needed:,} bytes of memory: must be at most {have:,}, which are free")


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
    """Free memory of a container: its limit minus its use, not counting its file cache."""
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max": no limit, a ValueError
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return limit - used + int(stat.get("file", 0))
