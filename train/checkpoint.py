"""Checkpoints of a run, by Orbax: weights, optimizer and step, each written whole or not at all."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

KEEP = 2  # if the newest is damaged the one before is still there


def _open(folder: Path) -> ocp.training.Checkpointer:
    newest = ocp.training.preservation_policies.LatestN(KEEP)
    return ocp.training.Checkpointer(folder.absolute(), preservation_policy=newest)


def save(folder: Path, step: int, state: Any, settings: dict[str, Any]) -> None:
    """Writes folder/step; keeps the newest two. Waits, because the next training step donates `state`."""
    with _open(folder) as checkpointer:
        checkpointer.save_checkpointables(step, {"state": state}, custom_metadata={"settings": settings}, overwrite=True)


def newest(folder: Path) -> Path:
    """The newest checkpoint. Raises ValueError if there is none."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise ValueError(f"resume: must find a checkpoint, {folder} has none")
    return folder / str(max(steps))


def restore(folder: Path, like: Any) -> tuple[int, dict[str, Any], Any]:
    """Step, settings and state of the newest checkpoint; `like` gives shapes, dtypes and devices.

    Raises ValueError if there is none, if it was cut short, or if it is of another model.
    """
    path = newest(folder)
    try:
        about = ocp.checkpointables_metadata(path.absolute())
        settings, found = about.custom_metadata["settings"], shapes(about.metadata["state"])
    except Exception as error:  # Orbax raises many kinds for a damaged folder
        raise damaged(path, error) from None
    wanted = shapes(like)
    if found != wanted:
        name = min(set(found.items()) ^ set(wanted.items()))[0]
        raise ValueError(f"{path}: must be of this model; {name} is {found.get(name)} there and {wanted.get(name)} here")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    try:
        state = ocp.load_checkpointables(path.absolute(), {"state": target})["state"]
    except Exception as error:
        raise damaged(path, error) from None
    return int(path.name), settings, state


def shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


def damaged(path: Path, error: Exception) -> ValueError:
    """One line for a checkpoint that cannot be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return ValueError(f"{path}: must be a whole checkpoint, it is damaged or cut short ({reason})")
