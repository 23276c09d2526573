"""Checkpoints of a run, by Orbax: folder/STEP holds weights and optimizer, folder/STEP.sha256 the sum of its every file.

The sums are written last, so a checkpoint without them was cut short by a crash and is passed over. They are tested
before Orbax reads, whose own account of a damaged file is pages long.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from train.metrics import write_whole

KEEP = 2  # should the newest be damaged, the one before is still there


def save(folder: Path, step: int, state: Any, settings: dict[str, Any]) -> None:
    """Writes folder/step; keeps the newest two. Waits, because the next training step donates `state`."""
    newest = ocp.training.preservation_policies.LatestN(KEEP)
    sums = folder / f"{step}.sha256"
    sums.unlink(missing_ok=True)
    with ocp.training.Checkpointer(folder.absolute(), preservation_policy=newest) as checkpointer:
        checkpointer.save_checkpointables(step, {"state": state}, custom_metadata={"settings": settings}, overwrite=True)
    write_whole(sums, "".join(f"{found}  {name}\n" for name, found in checksums(folder, step).items()))
    for old in folder.glob("*.sha256"):
        if not old.with_suffix("").exists():
            old.unlink()


def checksums(folder: Path, step: int) -> dict[str, str]:
    """sha256 of every file of a checkpoint by its name below `folder`, as `sha256sum` writes them."""
    files = sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_whole(folder: Path, step: int) -> None:
    """Raises ValueError if a file of the checkpoint is missing, cut or changed."""
    lines = (folder / f"{step}.sha256").read_text("utf-8", errors="replace").splitlines()
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = checksums(folder, step)
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong or not wanted:
        raise damaged(folder / str(step), f"{len(wrong)} files differ from {step}.sha256, first {wrong[:1]}")


def restore(folder: Path, like: Any) -> tuple[int, dict[str, Any], Any]:
    """Step, settings and state of the newest checkpoint; `like` gives shapes, dtypes and devices.

    Raises ValueError if there is none, if it is damaged, or if it is of another model.
    """
    steps = [int(path.stem) for path in folder.glob("*.sha256") if path.stem.isdigit()]
    if not steps:
        raise ValueError(f"resume: must find a checkpoint, {folder} has none")
    path = folder / str(max(steps))
    check_whole(folder, max(steps))
    about = ocp.checkpointables_metadata(path.absolute())
    found, wanted = shapes(about.metadata["state"]), shapes(like)
    if found != wanted:
        name = min(set(found.items()) ^ set(wanted.items()))[0]
        raise ValueError(f"{path}: must be of this model; {name} is {found.get(name)} there and {wanted.get(name)} here")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    state = ocp.load_checkpointables(path.absolute(), {"state": target})["state"]
    return max(steps), about.custom_metadata["settings"], state


def shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


def damaged(path: Path, reason: str) -> ValueError:
    """One line for a checkpoint that cannot be read."""
    return ValueError(f"{path}: must be a whole checkpoint, it is damaged or cut short ({' '.join(reason.split())[:160]})")
