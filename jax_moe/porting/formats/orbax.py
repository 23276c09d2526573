"""Orbax checkpoints of weights alone: {our path: array} as a nested dict, written whole, read array by array.

Size and sha256 of every file are stored, and checked before Orbax reads: its own message on a damaged file is pages
long.
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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from jax_moe.disk import same_bits
from jax_moe.guarded import is_file, require_memory
from jax_moe.porting.tensors import Header

Sums = dict[str, tuple[int, str]]  # {file: (size, sha256)}
SMALL = 1 << 20  # bytes up to which a file is checked when opened, not at the first reading
ITEM = "state"  # what ocp.load(folder) reads
LOGGERS = ("absl", "asyncio")  # of Orbax and the libraries below it


def write_orbax(path: Path, arrays: Mapping[str, np.ndarray]) -> Sums:
    """Writes a new folder that `orbax.checkpoint.v1.load` reads. Raises OSError if it cannot be written."""
    path.mkdir()
    inner = path / "new"  # Orbax leaves files beside its target: here they stay inside `path`
    save_tree(inner, unflatten_dict(dict(arrays), sep="."))
    for entry in list(inner.iterdir()):
        os.replace(entry, path / entry.name)
    inner.rmdir()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): (file.stat().st_size, _sha256(file)) for file in files}


def save_tree(path: Path, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """Writes nested dicts of arrays as a new Orbax folder. Raises OSError with a message of one line."""
    begin_tree(path, tree, metadata)()


def begin_tree(path: Path, tree: Any, metadata: dict[str, Any] | None = None) -> Callable[[], None]:
    """As `save_tree`, but returns once the arrays are on the host; what it returns waits for the end, in any thread.

    Orbax and the libraries below it stay silent until then.
    """
    from orbax.checkpoint import v1 as ocp

    with ExitStack() as stack:
        target = _entered(stack, path)
        written = ocp.save_checkpointables_async(target, {ITEM: tree}, custom_metadata=metadata)
        rest = stack.pop_all()

    def wait() -> None:
        with rest:
            written.result()

    return wait


def _entered(stack: ExitStack, path: Path) -> Path:
    """The path for Orbax, inside all that its writing needs around it."""
    stack.enter_context(quiet())
    target = stack.enter_context(plain(path))
    stack.enter_context(_in_one_line())
    return target


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turns every error of Orbax into an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # from TensorStore, with the system's error number in its text
        number = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(number[1]) if number else errno.EIO
        reason = os.strerror(code) if number else " ".join(str(error).split())[:160]
        raise OSError(code, reason) from None


@contextmanager
def plain(path: Path) -> Iterator[Path]:
    """The absolute path, or a link to it if Orbax would take it for a `glob` pattern or an unfinished checkpoint.

    The name of a folder that does not exist yet must be plain.
    """
    found, patterns = path.absolute(), {"*", "?", "[", "\\"} - {os.sep}
    if not patterns & set(str(found)) and ".orbax-checkpoint-tmp" not in str(found):
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        if patterns & set(folder):
            allowed = f"none of {' '.join(sorted(patterns))}, or that of TMPDIR"
            raise OSError(errno.EINVAL, f"its path must hold {allowed}")
        link = Path(folder) / "link"
        link.symlink_to(found if found.is_dir() else found.parent, target_is_directory=True)
        yield link if found.is_dir() else link / found.name


def sums_from_json(value: Any, where: str) -> Sums:
    """Sums from their entry in config.json. Raises ValueError for other values."""

    def fits(entry: Any) -> bool:
        return isinstance(entry, list) and [type(part) for part in entry] == [int, str]

    if not isinstance(value, dict) or not value or not all(map(fits, value.values())):
        raise ValueError(f"{where}={value!r:.80}: must be an object of size and sha256 of every file")
    return {name: (size, digest) for name, (size, digest) in value.items()}


@contextmanager
def _by_this_process() -> Iterator[None]:
    """Of several processes this one reads; Orbax would wait for the others."""
    from orbax.checkpoint import v1 as ocp

    if jax.process_count() == 1:
        yield
        return
    here = jax.process_index()
    with ocp.Context(
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    ):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax and the libraries below it, which print pages of traceback before they raise an error.

    After an error the threads started inside may still run, and stay silent, as do their tasks wherever they are
    collected; other threads log again.
    """
    before, hook = set(threading.enumerate()), sys.unraisablehook

    def without_late_threads(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # from TensorStore's threads that end too late
            hook(unraisable)

    sys.unraisablehook = without_late_threads
    with _muted():
        try:
            yield
        except BaseException:
            late = {thread.ident for thread in set(threading.enumerate()) - before}
            for name in LOGGERS:
                logging.getLogger(name).addFilter(
                    lambda record: record.thread not in late and "orbax/checkpoint" not in record.getMessage()
                )
            with _unwarned():
                gc.collect()  # asyncio logs tasks that nobody awaited when they are collected: now, while it is muted
            raise
    sys.unraisablehook = hook


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warnings of coroutines that Orbax gives up after an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
        yield


@contextmanager
def _muted() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_orbax(path: Path, sums: Sums, within: str | None = None) -> dict[str, Header]:
    """{our path: header}. Raises ValueError unless this is a whole checkpoint.

    Small files, such as those that say where the arrays are, are checked here, others at the first reading. `within`
    names the branch to read, such as the weights beside an optimizer's state.
    """
    from orbax.checkpoint import v1 as ocp

    sizes = {name: (path / name).stat().st_size if is_file(path / name) else None for name in sums}
    wrong = [name for name, (size, _) in sums.items() if sizes[name] != size]
    if wrong:
        raise damaged(path, f"missing or of another size: {', '.join(wrong[:20])}")
    _test(path, {name: digest for name, (size, digest) in sums.items() if size <= SMALL})
    with quiet(), _unwarned():
        try:
            with plain(path) as source, _by_this_process():
                tree = ocp.checkpointables_metadata(source).metadata[ITEM]
            if not isinstance(tree, Mapping):
                raise ValueError("its metadata cannot be read")
            leaves = _flat(tree if within is None else tree[within])
            others = {} if within is None else {name: branch for name, branch in tree.items() if name != within}
            large = {name: digest for name, (size, digest) in sums.items() if size > SMALL}
            read = _Reader(path, large, leaves, others, within)
            kinds = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()}
            return {name: Header(*kind, partial(read, name)) for name, kind in kinds.items()}
        except Exception as error:  # Orbax raises a dozen kinds of errors
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
    """The error, with a message of one line, for a checkpoint that cannot be read."""
    short = " ".join(reason.split())[:160]
    return ValueError(f"{path}: must be a whole Orbax checkpoint, it is damaged or cut short ({short})")


class _Reader:
    """Reads an array by its path, once the files are known to be whole."""

    def __init__(
        self, path: Path, untested: dict[str, str], leaves: Mapping[str, Any], others: Mapping[str, Any],
        within: str | None,
    ):
        self.path, self.untested, self.leaves, self.others, self.within = path, untested, leaves, others, within

    def __call__(self, wanted: str) -> np.ndarray:
        from orbax.checkpoint import v1 as ocp

        _test(self.path, self.untested)
        self.untested = {}
        leaf = self.leaves[wanted]
        require_memory(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize, f"{self.path}: {wanted}")
        others = dict.fromkeys(self.leaves, ocp.PLACEHOLDER)
        like: Any = unflatten_dict(others | {wanted: np.empty(leaf.shape, leaf.dtype)}, sep=".")
        if self.within is not None:
            like = {**jax.tree.map(lambda _: ocp.PLACEHOLDER, self.others), self.within: like}
        with quiet(), _unwarned():
            try:
                with plain(self.path) as source, _by_this_process():
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


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
