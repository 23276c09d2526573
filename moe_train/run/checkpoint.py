"""Checkpoints of a run, by Orbax: folder/STEP holds weights and optimizer, folder/STEP.sha256 the sums of its files.

A checkpoint is written to a temporary folder, read back, and renamed; its sums are written last. A checkpoint without
sums was cut short by a crash: it is skipped, and removed when the next checkpoint is written. Sums are compared before
Orbax reads, because its own errors on damaged files are pages long. Of several processes each writes and reads back its
parts of the arrays, and process 0 does the rest; all must see the same folder.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jax_moe.disk import put_in_place, same_bits, sync, write_whole
from jax_moe.porting.formats.orbax import plain, quiet, save_tree
from moe_train.run.together import ALONE, Processes

KEEP = 2  # if the newest is damaged, the checkpoint before it is left
BATCH_BYTES = 1 << 28  # arrays are read back in batches of this size


def save(
    folder: Path, step: int, state: Any, settings: dict[str, Any], processes: Processes = ALONE
) -> None:
    """Writes folder/step and keeps the newest two. Returns when it is written, as the next step donates `state`.

    Raises OSError with one line if it cannot be written; earlier checkpoints stay.
    """
    part = folder / f".{step}.part"
    new = part / "new"  # Orbax writes temporary files beside it, which are removed too
    try:
        processes.alone(lambda: _begin(folder, part))
        processes.everywhere(lambda: save_tree(new, state, {"settings": settings}))
        processes.everywhere(lambda: _verify(new, state, settings))
        processes.alone(lambda: _put(new, folder, step))
    finally:
        if processes.first:
            shutil.rmtree(part, ignore_errors=True)
    processes.alone(lambda: _finish(folder, step))


def _begin(folder: Path, part: Path) -> None:
    folder.mkdir(exist_ok=True)
    _clear(folder)
    part.mkdir()


def _put(new: Path, folder: Path, step: int) -> None:
    sync(new)
    (folder / f"{step}.sha256").unlink(missing_ok=True)
    put_in_place(new, folder / str(step))  # a previous folder is in the part then


def _finish(folder: Path, step: int) -> None:
    """Writes the sums, and removes the checkpoints before the newest two."""
    digests = checksums(folder, step).items()
    write_whole(folder / f"{step}.sha256", "".join(f"{digest}  {name}\n" for name, digest in digests))
    for old in saved_steps(folder)[:-KEEP]:
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


def _verify(path: Path, state: Any, settings: dict[str, Any]) -> None:
    """Raises OSError unless names, shapes, dtypes and bits read back as written, a batch of arrays at a time."""
    wrong: list[str] = []
    with quiet(), plain(path) as source:
        try:
            about = ocp.checkpointables_metadata(source)
            found, wanted = shapes(about.metadata["state"]), shapes(state)
            wrong += sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            if about.custom_metadata != {"settings": settings}:
                wrong.append("settings")
            leaves, structure = jax.tree.flatten(state)
            names = list(wanted)
            for batch in [] if wrong else _batches(leaves):
                like = [_like(leaf) if i in batch else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
                read = ocp.load_checkpointables(source, {"state": jax.tree.unflatten(structure, like)})["state"]
                again = jax.tree.leaves(read, is_leaf=lambda leaf: leaf is ocp.PLACEHOLDER)
                wrong += [names[i] for i in batch if not _same(leaves[i], again[i])]
        except Exception as error:  # Orbax raises exceptions of a dozen classes
            wrong.append(" ".join(str(error).split())[:160] or type(error).__name__)
    if wrong:
        raise OSError(f"{path}: must read back as written; differs in {', '.join(wrong[:5])}")


def _like(leaf: Any) -> Any:
    """What Orbax is to read an array as: on the host, or where a part of it is in other processes, as it lies there."""
    if getattr(leaf, "is_fully_addressable", True):
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _same(leaf: Any, again: Any) -> bool:
    """Whether the array, or this process's part of it, has the same bits."""
    if getattr(leaf, "is_fully_addressable", True):
        return same_bits(np.asarray(leaf), np.asarray(again))
    pairs = zip(leaf.addressable_shards, again.addressable_shards, strict=True)
    return all(same_bits(np.asarray(one.data), np.asarray(other.data)) for one, other in pairs)


def _batches(leaves: list[Any]) -> list[list[int]]:
    batches: list[list[int]] = []
    size = BATCH_BYTES
    for number, leaf in enumerate(leaves):
        if size + leaf.nbytes > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(number)
        size += leaf.nbytes
    return batches


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


def shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """{path: (shape, dtype)} of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, (_, leaf) in zip(names, leaves, strict=True)}


def damaged(path: Path, reason: str) -> ValueError:
    """The error, of one line, for a checkpoint that cannot be read."""
    reason = " ".join(reason.split())[:160]
    return ValueError(f"{path}: must be a whole checkpoint, it is damaged or cut short ({reason})")
