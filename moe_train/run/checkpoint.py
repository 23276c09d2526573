"""Checkpoints of a run, by Orbax: folder/STEP holds weights and optimizer, folder/STEP.sha256 the sums of its files.

A checkpoint is written to a temporary folder, read back, and renamed; its sums are written last. A checkpoint without
sums was cut short by a crash: it is skipped, and removed when the next checkpoint is written. Sums are compared before
Orbax reads, because its own errors on damaged files are pages long. Of several processes each writes and reads back its
parts of the arrays, and process 0 does the rest; all must see the same folder.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jax_moe.disk import put_in_place, sync, write_whole
from jax_moe.porting.formats.orbax import begin_tree, plain
from moe_train.run.keep import KEEP, Keep
from moe_train.run.read_back import on_host, shapes, verify
from moe_train.run.saving import Saving
from moe_train.run.together import ALONE, Processes


def begin(
    folder: Path, step: int, state: Any, settings: dict[str, Any], processes: Processes = ALONE, keep: Keep = KEEP
) -> Saving:
    """Begins to write folder/step; then removes older ones. Returns once `state` may be donated to the next step.

    Raises OSError with one line if it cannot be written, now or when its end is waited for; earlier checkpoints stay.
    """
    part = folder / f".{step}.part"
    new = part / "new"  # Orbax writes temporary files beside it, which are removed too

    def undo() -> None:
        if processes.first:
            shutil.rmtree(part, ignore_errors=True)

    def start() -> Callable[[], None]:
        with _naming(folder / str(step)):
            return begin_tree(new, state, {"settings": settings})

    def write() -> None:
        with _naming(folder / str(step)):
            written()
        verify(new, copies, settings)

    def put() -> None:
        if processes.first:
            _put(new, folder, step)
            shutil.rmtree(part, ignore_errors=True)
            _finish(folder, step, keep)

    try:
        processes.alone(lambda: _begin(folder, part))
        copies = on_host(state)
        written = processes.everywhere(start)
    except BaseException:
        undo()
        raise
    return Saving([write, put], processes, undo)


def save(
    folder: Path, step: int, state: Any, settings: dict[str, Any], processes: Processes = ALONE, keep: Keep = KEEP
) -> None:
    """As `begin`; returns when the checkpoint is whole."""
    begin(folder, step, state, settings, processes, keep).wait()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the checkpoint in an error of the system that names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _begin(folder: Path, part: Path) -> None:
    folder.mkdir(exist_ok=True)
    _clear(folder)
    part.mkdir()


def _put(new: Path, folder: Path, step: int) -> None:
    sync(new)
    (folder / f"{step}.sha256").unlink(missing_ok=True)
    put_in_place(new, folder / str(step))  # a previous folder is in the part then


def _finish(folder: Path, step: int, keep: Keep) -> None:
    """Writes the sums, and removes the checkpoints that are not kept."""
    digests = checksums(folder, step).items()
    write_whole(folder / f"{step}.sha256", "".join(f"{digest}  {name}\n" for name, digest in digests))
    for old in keep.removable(saved_steps(folder)):
        (folder / f"{old}.sha256").unlink()
        shutil.rmtree(folder / str(old), ignore_errors=True)


def saved_steps(folder: Path) -> list[int]:
    """The steps of all whole checkpoints, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.sha256") if path.stem.isdecimal())


def _clear(folder: Path) -> None:
    """Removes what a crash left: parts, Orbax's too, and checkpoints without sums. No other process writes here."""
    whole = set(map(str, saved_steps(folder)))
    for path in list(folder.iterdir()):
        parts = path.name.endswith(".part") or ".orbax-checkpoint-tmp" in path.name
        if path.is_dir() and (parts or (path.name.isdecimal() and path.name not in whole)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".") and ".sha256." in path.name:
            path.unlink(missing_ok=True)


def checksums(folder: Path, step: int) -> dict[str, str]:
    """{file of the checkpoint below `folder`: its sha256}, as in the output of `sha256sum`."""
    files = sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_whole(folder: Path, step: int) -> None:
    """Raises ValueError if a file of the checkpoint is missing, truncated or changed."""
    lines = (folder / f"{step}.sha256").read_text("utf-8", errors="replace").splitlines()
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = checksums(folder, step)
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong or not wanted:
        raise damaged(folder / str(step), f"{len(wrong)} files differ from {step}.sha256, first {wrong[:1]}")


def restore(
    folder: Path, like: Any, older: Any = None, processes: Processes = ALONE
) -> tuple[int, dict[str, Any], Any]:
    """Step, settings and state of the newest checkpoint; `like` gives names, shapes, dtypes and devices.

    `older` is the state as versions before this one saved it, which is read as well. Raises ValueError if there is no
    checkpoint, if it is damaged, or if it is of another model.
    """
    steps = saved_steps(folder)
    if not steps:
        raise ValueError(f"resume: must find a checkpoint, {folder} has none")
    path = folder / str(steps[-1])
    processes.agree({"step of the newest checkpoint": steps[-1]})
    processes.alone(lambda: check_whole(folder, steps[-1]))
    with plain(path) as source:
        about = ocp.checkpointables_metadata(source)
        found, wanted = shapes(about.metadata["state"]), shapes(like)
        if older is not None and found == shapes(older):
            like, wanted = older, found
        if found != wanted:
            name = min(set(found.items()) ^ set(wanted.items()))[0]
            differs = f"{name} is {found.get(name)} there and {wanted.get(name)} here"
            raise ValueError(f"{path}: must be of this model; {differs}")
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        state = ocp.load_checkpointables(source, {"state": target})["state"]
    return steps[-1], about.custom_metadata["settings"], state


def damaged(path: Path, reason: str) -> ValueError:
    """The error, of one line, for a checkpoint that cannot be read."""
    reason = " ".join(reason.split())[:160]
    return ValueError(f"{path}: must be a whole checkpoint, it is damaged or cut short ({reason})")
