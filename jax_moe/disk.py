"""Files and folders written whole or not at all: written beside the target, checked, synced, and renamed to it."""

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
NOTE = "port.json"  # says, in the folder of a resumable port, what is being ported
COMPARED = 1 << 19  # bytes compared at a time, so that they stay in the cache


def verify(written: Mapping[str, np.ndarray], read: Mapping[str, np.ndarray], path: Path) -> None:
    """Raises ValueError, naming the tensors, unless both have the same names, dtypes, shapes and bits."""
    both = written.keys() & read.keys()
    wrong = {*(written.keys() ^ read.keys()), *(name for name in both if not same_bits(written[name], read[name]))}
    if wrong:
        raise ValueError(f"{path}: must read back as written; differs in {', '.join(sorted(wrong)[:20])}")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bytes; a NaN equals itself. Contiguous arrays are not copied."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return all(np.array_equal(a[i : i + COMPARED], b[i : i + COMPARED]) for i in range(0, a.size, COMPARED))


def check_target(path: Path, overwrite: bool, replaceable: Callable[[Path], bool] = Path.is_file) -> None:
    """Raises ValueError if `path` exists and may not be replaced, or cannot be written."""
    try:
        there = path.exists() or path.is_symlink()
    except OSError as error:  # the file system does not allow the name
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    if there:
        if not overwrite:
            raise ValueError(f"{path}: exists already; overwrite=True replaces it")
        if not replaceable(path):
            raise ValueError(f"{path}: exists and is not a checkpoint; it is not replaced")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: cannot be written, {path.parent} is not a folder")


def put_in_place(part: Path, path: Path) -> Path | None:
    """Renames `part` to `path`. Returns the new place of a folder that was there; if renaming fails, it is put back."""
    old = part.with_name(f"{part.name}.old") if path.is_dir() else None
    if old is not None:
        os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        if old is not None:
            os.replace(old, path)
        raise
    with suppress(OSError):  # a folder may be writable and not readable
        sync(path.parent, deep=False)
    return old


@contextmanager
def writing(path: Path, overwrite: bool, replaceable: Callable[[Path], bool] = Path.is_file) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` at the end, removed on any error.

    Raises ValueError if `path` exists and may not be overwritten, if the folder is not writable, or if another process
    is writing `path`.
    """
    check_target(path, overwrite, replaceable)
    with alone(path) as lock:
        if lock.works:
            clear_parts(path)
        check_target(path, overwrite, replaceable)
        part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
        try:
            yield part
            check_target(path, overwrite, replaceable)  # a program that knows no lock may have written there
            sync(part)
            old = put_in_place(part, path)
            if old is not None:
                shutil.rmtree(old)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path}: cannot be written ({reason})") from None
        finally:
            _remove(part)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: renamed to `path` at the end, removed on any error.

    For a folder in which no other process writes; elsewhere `writing`. An error of the operating system names `path`.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno is not None:  # of the system; it may not name the file yet
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # already renamed, or the folder cannot be written
            part.unlink()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def clear_parts(path: Path) -> None:
    """Removes what killed processes left beside `path`, whose lock we hold, and puts back a folder that they moved."""
    left = re.compile(re.escape(f".{path.stem}.") + "[0-9a-f]{8}" + re.escape(f".part{path.suffix}") + r"(\.old)?")
    for entry in list(path.parent.iterdir()):
        found = left.fullmatch(entry.name)
        if found and found[1] and not path.exists():
            os.replace(entry, path)
        elif found:
            _remove(entry)
    part = resumable_part(path)
    if part.is_dir() and {entry.name for entry in part.iterdir()} <= {NOTE, path.name, f"{path.name}.old"}:
        put_back(path)
        _remove(part)


def resumable_part(path: Path) -> Path:
    """The folder in which a resumable port prepares `path`."""
    return path.with_name(f".{path.name}.part")


def put_back(path: Path) -> None:
    """Puts a folder back at `path` if a resumable port moved it and was killed before it replaced it."""
    old = resumable_part(path) / f"{path.name}.old"
    if old.exists() and not path.exists():
        os.replace(old, path)


def _remove(part: Path) -> None:
    """Removes a file or folder. Errors are ignored: the user hears of the error that made this necessary."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def sync(path: Path, deep: bool = True) -> None:
    """Flushes a file, or a folder with its contents, from the system's cache to the disk."""
    for entry in [*(path.rglob("*") if deep else ()), path]:
        if entry.is_file() or hasattr(os, "O_DIRECTORY"):  # without it a folder cannot be opened
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_space(path: Path, needed: int) -> None:
    """Raises ValueError if the disk of `path` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        reason = os.strerror(errno.ENOSPC)
        raise ValueError(f"{path}: cannot be written ({reason}: needs {needed:,} bytes, {free:,} are free)")
