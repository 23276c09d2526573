"""The output folder of a run: its choice, its lock, and the settings recorded in it."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from jax_moe.config.checks import require, shorten
from jax_moe.disk import whole, write_whole
from jax_moe.guarded import read_object
from jax_moe.locks import BusyError, Lock
from moe_train.configs.known import Known
from moe_train.configs.settings import FREE_ON_RESUME, Start, TrainConfig, flat, from_flat
from moe_train.run import metrics

RUNS = Path("runs")
CONFIG, LOCK = "config.json", ".lock"


def choose(start: Start) -> Path:
    """The folder that `--out` names; else the next free runs/NNN, or with --resume the newest runs/NNN with a run."""
    if start.out is not None:
        return Path(start.out)
    numbers = [int(path.name) for path in RUNS.glob("*") if path.name.isdecimal()] if RUNS.is_dir() else []
    if start.resume:
        require(bool(numbers), "resume", True, "used with --out FOLDER, or where runs/NNN exists")
        begun = [number for number in numbers if (RUNS / f"{number:03d}" / CONFIG).exists()]
        return RUNS / f"{max(begun or numbers):03d}"
    return RUNS / f"{max(numbers, default=0) + 1:03d}"


def claim(folder: Path, *, numbered: bool = False) -> tuple[Path, Lock]:
    """(the folder, made if it is missing; its lock). `numbered`: the next free number if another process took this.

    Raises ValueError if the folder is not empty, cannot be written, or belongs to a running run.
    """
    try:
        while numbered:
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
                break
            except FileExistsError:
                folder = folder.with_name(f"{int(folder.name) + 1:03d}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from None
    lock = lock_run(folder)
    leftover = re.compile(rf"{re.escape(LOCK)}|\.{re.escape(CONFIG)}\.part")  # of a process that died at its start
    if all(leftover.fullmatch(path.name) for path in folder.iterdir()):
        return folder, lock
    lock.release()
    what = "--resume continues the run in it" if (folder / CONFIG).exists() else "it holds no run, choose another name"
    raise ValueError(f"out={str(folder)!r}: must be new or empty; {what}")


def lock_run(folder: Path) -> Lock:
    """The lock that a run holds until it ends. Raises ValueError if another process holds it, or it cannot be made."""
    try:
        return Lock(folder / LOCK)
    except BusyError:
        busy = "is being written by another process; wait for its end, or stop it"
        raise ValueError(f"out={str(folder)!r}: {busy}") from None
    except OSError as error:
        raise _not_writable(folder, error) from None


class Unlocked:
    """In place of the lock in processes that do not write: process 0 holds it for all."""

    def lost(self) -> bool:
        """False: process 0 looks."""
        return False

    def release(self) -> None:
        """Does nothing."""


def _not_writable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"out={str(folder)!r}: must be a folder that can be written ({error.strerror})")


def release(folder: Path, lock: Lock | Unlocked) -> None:
    """Releases a claimed folder, and removes it if it is still empty."""
    lock.release()
    with suppress(OSError):
        folder.rmdir()


def saved_steps(folder: Path) -> list[int]:
    """The steps of the run's checkpoints, of either framework, in order."""
    found = [path.stem for path in (folder / "checkpoints").glob("*") if path.suffix in (".sha256", ".pt")]
    return sorted(int(name) for name in found if name.isdecimal())


def never_saved(folder: Path, config: TrainConfig) -> bool:
    """Whether the run ended before its first checkpoint was whole, as it is at the latest where the second is due."""
    rows = metrics.read(folder) if (folder / metrics.FILE).exists() else []
    return not saved_steps(folder) and all(row["step"] < 2 * config.checkpoint_every for row in rows)


def what_is_saved(folder: Path) -> str:
    """In one line, from which checkpoint a run that ended early can continue."""
    steps = saved_steps(folder)
    if steps:
        return f"the last checkpoint is of step {steps[-1]}, in {folder / 'checkpoints'}; --resume goes on from it"
    return "no checkpoint was saved; --resume starts over"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run, with its settings as "config" and its text's record as "known".

    Raises ValueError if the file is missing or unreadable, or holds a value that no run writes.
    """
    path = folder / CONFIG
    try:
        written = read_object(path)
        return {**written, "config": from_flat(written.get("settings")), "known": _known(written)}
    except FileNotFoundError:
        raise ValueError(f"resume: must find a run, {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path}: must be the settings of a run ({shorten(error, 300)})") from None


def read_known(folder: Path, config: TrainConfig) -> Known:
    """The run's record of its text, and whether it has a checkpoint."""
    return replace(read_config(folder)["known"], saved=not never_saved(folder, config))


def _known(written: dict[str, Any]) -> Known:
    text, model = written.get("text"), written.get("model")
    require(isinstance(text, dict) and isinstance(text.get("sha256"), str), "text", text, "an object with a sha256")
    require(isinstance(model, dict), "model", model, "an object")
    assert isinstance(text, dict) and isinstance(model, dict)
    vocabulary, size = text.get("vocabulary"), model.get("vocab_size")
    whole = vocabulary is None or (isinstance(vocabulary, str) and len(set(vocabulary)) == len(vocabulary) > 0)
    require(whole, "vocabulary", vocabulary, "different characters")
    (vocabulary or "").encode()  # a lone surrogate is a ValueError
    require(size is None or (type(size) is int and size > 0), "vocab_size", size, "an integer of at least 1")
    return Known(text["sha256"], vocabulary, size)


def write_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """Writes model.safetensors, whole or not at all."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    with whole(folder / "model.safetensors") as part:
        part.write_bytes(to_safetensors(contiguous, metadata={"format": "pt"}))


def versions() -> dict[str, str]:
    """The versions of the packages that make a run."""
    found = {}
    for name in ("jax", "flax", "optax", "torch", "numpy", "jax-moe"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_config(folder: Path, config: TrainConfig, about: dict[str, Any]) -> None:
    """Writes config.json: settings, model, text, and the versions of the packages that made the run."""
    content = {"settings": flat(config), **about, "versions": versions()}
    write_whole(folder / CONFIG, json.dumps(content, indent=1) + "\n")


def check_same(config: TrainConfig, saved: TrainConfig, where: Path) -> None:
    """Raises ValueError for a setting that a resumed run may not change. `steps` may grow."""
    here, there = flat(config), flat(saved)
    for name, value in here.items():
        longer = name == "steps" and value > there[name]
        allowed = f"at least {there[name]}" if name == "steps" else repr(there[name])
        if name not in FREE_ON_RESUME and not longer:
            require(value == there[name], name, value, f"{allowed} as in {where}, which --resume continues")
