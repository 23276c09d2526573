"""State dicts on disk: `.safetensors` and `.pt`, written beside and renamed only after they read back bit for bit."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from jax_moe.locks import alone

READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
COMPARED = 1 << 19  # bytes at a time: they stay in the cache


def verify(written: Mapping[str, np.ndarray], read: Mapping[str, np.ndarray], path: Path) -> None:
    """Raises ValueError, naming the tensors, unless both hold the same names, dtypes, shapes and bits."""
    both = written.keys() & read.keys()
    wrong = {*(written.keys() ^ read.keys()), *(name for name in both if not same_bits(written[name], read[name]))}
    if wrong:
        raise ValueError(f"{path}: must read back as written; differs in {', '.join(sorted(wrong)[:20])}")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bytes; a NaN equals itself. Contiguous arrays are not copied."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (np.ascontiguousarray(one).reshape(-1).view(np.uint8) for one in (a, b))
    return all(np.array_equal(a[i : i + COMPARED], b[i : i + COMPARED]) for i in range(0, a.size, COMPARED))


def check_target(path: Path, overwrite: bool, replaceable: Callable[[Path], bool] = Path.is_file) -> None:
    """Raises ValueError if `path` exists and may not be replaced, or cannot be written."""
    try:
        there = path.exists() or path.is_symlink()
    except OSError as error:  # a name that the file system does not allow
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    if there:
        if not overwrite:
            raise ValueError(f"{path}: exists already; overwrite=True replaces it")
        if not replaceable(path):
            raise ValueError(f"{path}: exists and is not a checkpoint; it is not replaced")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: cannot be written, {path.parent} is not a folder")


def put_in_place(part: Path, path: Path) -> Path | None:
    """Renames `part` to `path`; a folder that was there is put back if that fails, else where it is now is returned."""
    old = part.with_name(f"{part.name}.old") if path.is_dir() else None
    if old is not None:
        os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        if old is not None:
            os.replace(old, path)
        raise
    with suppress(OSError):  # a folder that may be written and not read
        sync(path.parent, deep=False)
    return old


@contextmanager
def writing(path: Path, overwrite: bool, replaceable: Callable[[Path], bool] = Path.is_file) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` at the end, removed on any error.

    Raises ValueError if `path` exists and may not be overwritten, if the folder cannot be written, or if another process
    is writing it.
    """
    check_target(path, overwrite, replaceable)
    with alone(path) as lock:
        if lock.works:
            clear_parts(path)
        check_target(path, overwrite, replaceable)
        part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
        try:
            yield part
            check_target(path, overwrite, replaceable)  # others than us may write there too
            sync(part)
            old = put_in_place(part, path)
            if old is not None:
                shutil.rmtree(old)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path}: cannot be written ({reason})") from None
        finally:
            _remove(part)


def clear_parts(path: Path) -> None:
    """Removes what a killed process left beside `path`, whose lock is ours; a folder that it had moved away is put back."""
    left = re.compile(re.escape(f".{path.stem}.") + "[0-9a-f]{8}" + re.escape(f".part{path.suffix}") + r"(\.old)?")
    for one in list(path.parent.iterdir()):
        found = left.fullmatch(one.name)
        if found and found[1] and not path.exists():
            os.replace(one, path)
        elif found:
            _remove(one)


def _remove(part: Path) -> None:
    """Away with it, as far as the system lets us: what is told to the user is why it is in the way, not this."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def sync(path: Path, deep: bool = True) -> None:
    """Returns when the file, or the folder with all that is in it, is on the disk and not only in its cache."""
    for one in [*(path.rglob("*") if deep else ()), path]:
        if one.is_file() or hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
            descriptor = os.open(one, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_space(path: Path, needed: int) -> None:
    """Raises ValueError if the disk that holds the folder of `path` has fewer bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        reason = os.strerror(errno.ENOSPC)
        raise ValueError(f"{path}: cannot be written ({reason}: needs {needed:,} bytes, {free:,} are free)")
