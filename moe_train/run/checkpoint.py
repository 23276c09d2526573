"""Checkpoints of a run, by Orbax: folder/STEP holds weights and optimizer, folder/STEP.sha256 the sums of its files.

A checkpoint is written to a temporary folder, read back, and renamed; its sums are written last. A checkpoint without
sums was cut short by a crash: it is skipped, and removed when the next checkpoint is written. Sums are compared before
Orbax reads, because its own errors on damaged files are pages long. Of several processes each writes and reads back its
parts of the arrays, and process 0 does the rest; all must see the same folder.
"""

import hashlib
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from jax_moe.disk import put_in_place, same_bits, sync, write_whole
from jax_moe.porting.formats.orbax import begin_tree, plain, quiet
from moe_train.run.keep import KEEP, Keep
from moe_train.run.saving import Saving
from moe_train.run.together import ALONE, Processes

BATCH_BYTES = 1 << 28  # arrays are read back in batches of this size


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

    def write() -> None:
        written()
        _verify(new, copies, settings)

    def put() -> None:
        if processes.first:
            _put(new, folder, step)
            shutil.rmtree(part, ignore_errors=True)
            _finish(folder, step, keep)

    try:
        processes.alone(lambda: _begin(folder, part))
        copies = _on_host(state)
        written = processes.everywhere(lambda: begin_tree(new, state, {"settings": settings}))
    except BaseException:
        undo()
        raise
    return Saving([write, put], processes, undo)


def save(
    folder: Path, step: int, state: Any, settings: dict[str, Any], processes: Processes = ALONE, keep: Keep = KEEP
) -> None:
    """As `begin`; returns when the checkpoint is whole."""
    begin(folder, step, state, settings, processes, keep).wait()


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


@dataclass(frozen=True)
class Copy:
    """An array, or this process's parts of it, in host memory; `sharding` if other processes hold the other parts.

    On a CPU the parts are views of the array's own memory, and XLA does not donate memory that has views.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding | None
    parts: dict[str, tuple[Any, np.ndarray]]  # {its place in words: its place, the part}

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def like(self) -> Any:
        """What Orbax is to read it as: on the host, or where a part of it is in other processes, as it lies there."""
        if self.sharding is None:
            return np.empty(self.shape, self.dtype)
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)

    def same(self, again: Any) -> bool:
        """Whether the array that was read, or this process's parts of it, has the same bits."""
        if self.sharding is None:
            read = {place: np.asarray(again)[index] for place, (index, _) in self.parts.items()}
        else:
            read = {str(shard.index): np.asarray(shard.data) for shard in again.addressable_shards}
        return all(same_bits(part, np.asarray(read[place])) for place, (_, part) in self.parts.items())


def _on_host(state: Any) -> Any:
    """The state with a `Copy` in place of every array; one copy of what several devices hold."""

    def shards(leaf: Any) -> dict[str, Any]:
        return {str(shard.index): shard for shard in leaf.addressable_shards} if isinstance(leaf, jax.Array) else {}

    def copy(leaf: Any) -> Copy:
        if not isinstance(leaf, jax.Array):
            return Copy(leaf.shape, leaf.dtype, None, {"": (..., leaf)})
        parts = {place: (shard.index, np.asarray(shard.data)) for place, shard in shards(leaf).items()}
        return Copy(leaf.shape, leaf.dtype, None if leaf.is_fully_addressable else leaf.sharding, parts)

    for leaf in jax.tree.leaves(state):
        for shard in shards(leaf).values():
            shard.data.copy_to_host_async()  # all of them at once
    return jax.tree.map(copy, state)


def _verify(path: Path, copies: Any, settings: dict[str, Any]) -> None:
    """Raises OSError unless names, shapes, dtypes and bits read back as written, a batch of arrays at a time."""
    wrong: list[str] = []
    with quiet(), plain(path) as source:
        try:
            about = ocp.checkpointables_metadata(source)
            found, wanted = shapes(about.metadata["state"]), shapes(copies)
            wrong += sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            if about.custom_metadata != {"settings": settings}:
                wrong.append("settings")
            leaves, structure = jax.tree.flatten(copies)
            names = list(wanted)
            for batch in [] if wrong else _batches(leaves):
                like = [leaf.like if i in batch else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
                read = ocp.load_checkpointables(source, {"state": jax.tree.unflatten(structure, like)})["state"]
                again = jax.tree.leaves(read, is_leaf=lambda leaf: leaf is ocp.PLACEHOLDER)
                wrong += [names[i] for i in batch if not leaves[i].same(again[i])]
        except Exception as error:  # Orbax raises exceptions of a dozen classes
            wrong.append(" ".join(str(error).split())[:160] or type(error).__name__)
    if wrong:
        raise OSError(f"{path}: must read back as written; differs in {', '.join(wrong[:5])}")


def _batches(leaves: list[Copy]) -> list[list[int]]:
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
