"""Tensors streamed into safetensors shards, one in memory at a time; each shard is verified by reading it back.

The shards are written in a hidden folder beside the target, with a note of their source. After an interrupt the folder
stays, and the same port continues from it. After an error, or once the target is complete, it is removed.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.disk import NOTE, check_space, check_target, put_back, put_in_place, resumable_part, sync
from jax_moe.guarded import read_json
from jax_moe.locks import alone
from jax_moe.porting.errors import PortError
from jax_moe.porting.formats.safetensors import in_batches, reads_as, write_tensors
from jax_moe.porting.formats.shards import write_index
from jax_moe.porting.tensors import Header, all_finite

Advance = Callable[[int], None]


def counted(headers: Mapping[str, Header], advance: Advance) -> dict[str, Header]:
    """The same tensors; each reading calls `advance` with its bytes."""

    def reader(header: Header) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            value = header.read()
            advance(header.nbytes)
            return value

        return read

    return {name: replace(header, read=reader(header)) for name, header in headers.items()}


def write_shards(folder: Path, headers: Mapping[str, Header], shards: Mapping[str, list[str]], advance: Advance) -> int:
    """Writes the missing shards and the index, and compares each shard with its source. Returns how many existed."""
    kept = 0
    for file, names in shards.items():
        part = {name: headers[name] for name in names}
        if (folder / file).exists() and _fits(folder / file, part):
            advance(sum(header.nbytes for header in part.values()))
            kept += 1
            continue
        unfinished = folder / f"{file}.unfinished"
        write_tensors(unfinished, counted(part, advance))
        sync(unfinished)
        os.replace(unfinished, folder / file)
    write_index(folder, headers, shards)
    return kept


def _fits(path: Path, headers: Mapping[str, Header]) -> bool:
    """Whether a file holds exactly these tensors, bit for bit; both sides are read, some megabytes at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            if set(file.keys()) != headers.keys():
                return False
        for names in in_batches(headers, headers):
            with safe_open(path, framework="np") as file:
                if not all(reads_as(file, name, headers[name].read()) for name in names):
                    return False
    except (SafetensorError, OSError):
        return False
    return True


@dataclass(frozen=True)
class Readings:
    """Tensors that are converted when read; those with NaN or infinity are refused, all of them by name."""

    headers: Mapping[str, Header]
    dtype: np.dtype | None
    allow_nonfinite: bool
    where: str
    kept: Collection[str] = ()  # names of tensors that keep their dtype

    def converted(self) -> dict[str, Header]:
        """The same tensors with their new dtype."""
        shapes = {name: header.shape for name, header in self.headers.items()}
        return {name: Header(shape, self._dtype(name), self._reader(name)) for name, shape in shapes.items()}

    def _dtype(self, name: str) -> np.dtype:
        if self.dtype is None or name in self.kept:
            return self.headers[name].dtype
        return self.dtype

    def _reader(self, name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            value, bad = self._read(name)
            if bad:
                raise PortError(self.where, wrong=list(filter(None, (self._read(other)[1] for other in self.headers))))
            return value

        return read

    def _read(self, name: str) -> tuple[np.ndarray, str]:
        """The tensor, and a message if it is refused."""
        before = self.headers[name].read()
        with np.errstate(over="ignore"):  # checked below
            value = before.astype(self._dtype(name), copy=False)
        if self.allow_nonfinite or all_finite(value):
            return value, ""
        why = f"is too large for {self._dtype(name)}" if all_finite(before) else "holds NaN or infinity"
        return value, f"{name} {why}"


def identity(path: Path) -> dict[str, Any]:
    """What identifies a source: its path, and the size and modification time of every file."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    seen = {file.relative_to(path).as_posix(): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"path": str(path.absolute()), "files": seen}


@contextmanager
def resumable(
    path: Path, overwrite: bool, replaceable: Callable[[Path], bool], note: dict[str, Any], say: Callable[[str], None]
) -> Iterator[Path]:
    """A folder to fill, renamed to `path` at the end. The folder of an interrupted port with an equal note is reused.

    Raises ValueError as `check_target`, for a full disk, or if another process is filling the folder.
    """
    check_target(path, overwrite, replaceable)
    outer = resumable_part(path)
    with alone(path), _cleaned_up(outer, path):
        check_target(path, overwrite, replaceable)
        outer.mkdir(exist_ok=True)
        put_back(path)
        _begin(outer, path.name, note, say)
        yield outer / path.name
        sync(outer / path.name)
        check_target(path, overwrite, replaceable)  # another program, which knows no lock, may have written there
        put_in_place(outer / path.name, path)


@contextmanager
def _cleaned_up(outer: Path, path: Path) -> Iterator[None]:
    """Removes `outer` at the end and on every error, unless an interrupt leaves finished shards to continue from.

    Errors of the system become a ValueError of one line.
    """
    try:
        yield
    except KeyboardInterrupt:
        done = len(list((outer / path.name).glob("*.safetensors")))
        if done == 0:
            shutil.rmtree(outer, ignore_errors=True)
            raise
        said = f"{done} finished shards wait in {outer}: the same command goes on from there"
        raise KeyboardInterrupt(said) from None
    except (OSError, RuntimeError) as error:
        shutil.rmtree(outer, ignore_errors=True)
        raise ValueError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    except BaseException:
        shutil.rmtree(outer, ignore_errors=True)
        raise
    shutil.rmtree(outer)


def _begin(outer: Path, name: str, note: dict[str, Any], say: Callable[[str], None]) -> None:
    """Keeps the folder `name` in `outer` if its note is equal; else starts an empty folder."""
    found = _note(outer)
    if found == note:
        return
    if found is not None:
        say(f"{outer}: left by another port, or its source has changed; starting afresh")
    shutil.rmtree(outer / name, ignore_errors=True)
    (outer / name).mkdir()
    (outer / NOTE).write_text(json.dumps(note), encoding="utf-8")


def room_for(path: Path, needed: int) -> None:
    """Raises ValueError as `check_space`. What an interrupted port left is counted as free: it is reused or removed."""
    left = resumable_part(path)
    try:
        there = sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
    except OSError as error:  # a name that is too long with its ending
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    check_space(path, needed - there)


def _note(outer: Path) -> Any:
    try:
        return read_json(outer / NOTE)
    except (OSError, ValueError):
        return None
