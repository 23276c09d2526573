"""Orbax checkpoints of bare weights: {our path: array} as a nested dict, written whole, read one array at a time.

Size and sha256 of every file are kept, and tested before Orbax reads, whose own account of a damaged file is pages long.
"""

import errno
import gc
import hashlib
import logging
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe.disk import same_bits
from jax_moe.guarded import is_file, require_memory
from jax_moe.porting.tensors import Header

Sums = dict[str, tuple[int, str]]  # {file: size and sha256}
SMALL = 1 << 20  # bytes of a file
ITEM = "state"  # what ocp.load(folder) reads


def write_orbax(path: Path, arrays: Mapping[str, np.ndarray]) -> Sums:
    """Writes a new folder that `orbax.checkpoint.v1.load` reads. Raises OSError where it cannot be written."""

    path.mkdir()
    inner = path / "new"  # Orbax works beside what it writes: there, too, nothing stays behind
    save_tree(inner, _nested(arrays))
    for entry in list(inner.iterdir()):
        os.replace(entry, path / entry.name)
    inner.rmdir()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): (file.stat().st_size, _sha256(file)) for file in files}


def save_tree(path: Path, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """Writes nested dicts of arrays as a new folder by Orbax. Raises OSError with one line where it cannot be written."""
    from orbax.checkpoint import v1 as ocp

    with quiet(), plain(path) as target:
        try:
            ocp.save_checkpointables(target, {ITEM: tree}, custom_metadata=metadata)
        except OSError:
            raise
        except Exception as error:  # of the library below Orbax, the system's number in its text
            number = re.search(r"os_error_code='(\d+)'", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else " ".join(str(error).split())[:160]) from None


@contextmanager
def plain(path: Path) -> Iterator[Path]:
    """The absolute path; through a link where it holds what Orbax takes for a pattern of `glob` or for its unfinished work.

    A folder still to be made has a plain name itself.
    """
    found, patterns = path.absolute(), {"*", "?", "[", "\\"} - {os.sep}
    if not patterns & set(str(found)) and ".orbax-checkpoint-tmp" not in str(found):
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        if patterns & set(folder):
            raise OSError(errno.EINVAL, f"its path must hold none of {' '.join(sorted(patterns))}, or that of TMPDIR")
        link = Path(folder) / "link"
        link.symlink_to(found if found.is_dir() else found.parent, target_is_directory=True)
        yield link if found.is_dir() else link / found.name


def sums_from_json(value: Any, where: str) -> Sums:
    """Sums as they stand in config.json. Raises ValueError if they are none."""
    fits = isinstance(value, dict) and value and all(
        isinstance(one, list) and len(one) == 2 and isinstance(one[0], int) and isinstance(one[1], str) for one in value.values()
    )
    if not fits:
        raise ValueError(f"{where}={value!r:.80}: must be an object of size and sha256 of every file of the checkpoint")
    return {name: (size, digest) for name, (size, digest) in value.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Orbax and what is below it print an error with pages of traceback before they raise it; the one line is ours.

    After an error the threads started inside may still run, and stay silent; every other thread is heard again.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    before = set(threading.enumerate())

    def rest(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # what threads of the library below say that come too late
            hook(unraisable)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = rest
    try:
        yield
        sys.unraisablehook = hook
    except BaseException:
        late = {thread.ident for thread in set(threading.enumerate()) - before}
        for logger in loggers:
            logger.addFilter(lambda record: record.thread not in late)
        gc.collect()  # tasks of asyncio that nobody awaited speak when they are collected: now, while nothing is heard
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_orbax(path: Path, sums: Sums, within: str | None = None) -> dict[str, Header]:
    """{our path: header}. Raises ValueError for what is no whole checkpoint.

    Small files, among which those that say where the arrays are, are tested here; the others at the first reading.
    `within` names the branch that is read, such as the weights beside an optimizer's state.
    """
    from orbax.checkpoint import v1 as ocp

    wrong = [name for name, (size, _) in sums.items() if not is_file(path / name) or (path / name).stat().st_size != size]
    if wrong:
        raise damaged(path, f"missing or of another size: {', '.join(wrong[:20])}")
    _test(path, {name: digest for name, (size, digest) in sums.items() if size <= SMALL})
    with quiet():
        try:
            with plain(path) as source:
                tree = ocp.checkpointables_metadata(source).metadata[ITEM]
            leaves = _flat(tree if within is None else tree[within])
            others = {} if within is None else {name: branch for name, branch in tree.items() if name != within}
            large = {name: digest for name, (size, digest) in sums.items() if size > SMALL}
            read = _Reader(path, large, leaves, others, within)
            return {name: Header(tuple(one.shape), np.dtype(one.dtype), partial(read, name)) for name, one in leaves.items()}
        except Exception as error:  # Orbax raises a dozen kinds
            raise damaged(path, str(error)) from None


def verify_orbax(path: Path, sums: Sums, arrays: Mapping[str, np.ndarray], advance: Callable[[int], None]) -> None:
    """Raises ValueError unless every array reads back bit for bit."""
    found = read_orbax(path, sums)
    wrong = sorted(found.keys() ^ arrays.keys())
    for name in found.keys() & arrays.keys():
        if not same_bits(arrays[name], found[name].read()):
            wrong.append(name)
        advance(arrays[name].nbytes)
    if wrong:
        raise ValueError(f"{path}: must read back as written; differs in {', '.join(wrong[:20])}")


def damaged(path: Path, reason: str) -> ValueError:
    """One line for a checkpoint that cannot be read."""
    return ValueError(f"{path}: must be a whole Orbax checkpoint, it is damaged or cut short ({' '.join(reason.split())[:160]})")


class _Reader:
    """Reads one array by its path, once the files are known to be whole."""

    def __init__(
        self, path: Path, untested: dict[str, str], leaves: Mapping[str, Any], others: Mapping[str, Any], within: str | None
    ):
        self.path, self.untested, self.leaves, self.others, self.within = path, untested, leaves, others, within

    def __call__(self, wanted: str) -> np.ndarray:
        from orbax.checkpoint import v1 as ocp

        _test(self.path, self.untested)
        self.untested = {}
        leaf = self.leaves[wanted]
        require_memory(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize, f"{self.path}: {wanted}")
        like: Any = _nested(dict.fromkeys(self.leaves, ocp.PLACEHOLDER) | {wanted: np.empty(leaf.shape, leaf.dtype)})
        if self.within is not None:
            like = {**jax.tree.map(lambda _: ocp.PLACEHOLDER, self.others), self.within: like}
        with quiet():
            try:
                with plain(self.path) as source:
                    found = ocp.load_checkpointables(source, {ITEM: like})[ITEM]
                return _flat(found if self.within is None else found[self.within])[wanted]
            except Exception as error:
                raise damaged(self.path, str(error)) from None


def _test(path: Path, digests: Mapping[str, str]) -> None:
    wrong = [name for name, digest in digests.items() if _sha256(path / name) != digest]
    if wrong:
        raise damaged(path, f"changed: {', '.join(wrong[:20])}")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
