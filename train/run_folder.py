"""The output folder of a run: which one, may it be written, what it says of its settings."""

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from jax_moe.config import require
from jax_moe.porting.claim import Claim, TakenError
from train import metrics
from train.configs.settings import FREE_ON_RESUME, Start, TrainConfig, flat, from_flat

RUNS = Path("runs")
CONFIG = "config.json"
LOCK = ".lock"
WEIGHTS = "model.safetensors"
PATTERN = "[]*?\\"  # characters of file name patterns


def choose(start: Start) -> Path | None:
    """The folder that `--out` names, with --resume alone the newest runs/NNN, or None: the next one, once the run begins."""
    if start.out is not None:
        return Path(start.out)
    if not start.resume:
        return None
    numbers = _numbers()
    require(bool(numbers), "resume", True, "used with --out FOLDER, or where runs/NNN exists")
    return RUNS / f"{max(numbers):03d}"


def claim(folder: Path | None, resume: bool = False) -> tuple[Path, Claim]:
    """Takes the folder of a run for this process: a new one is made, of None the next runs/NNN.

    Raises ValueError if another process holds it, if a new run's folder holds anything, or if it cannot be written.
    """
    try:
        if folder is None:
            return _next()
        check_name(folder)
        folder.mkdir(parents=True, exist_ok=True)
        held = Claim(folder / LOCK)
    except TakenError:
        raise ValueError(f"out={str(folder)!r}: another run is writing it: must be another folder") from None
    except OSError as error:
        raise ValueError(f"out={str(folder or RUNS)!r}: must be a folder that can be written ({error.strerror})") from None
    if not resume and any(entry.name != LOCK for entry in folder.iterdir()):
        held.release()
        raise ValueError(f"out={str(folder)!r}: must be new or empty; --resume continues the run in it")
    return folder, held


def _next() -> tuple[Path, Claim]:
    """The next number whose folder this process makes: of two that try, one goes on to the number after."""
    check_name(RUNS)
    RUNS.mkdir(exist_ok=True)
    number = max(_numbers(), default=0)
    while True:
        number += 1
        folder = RUNS / f"{number:03d}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder, Claim(folder / LOCK)


def _numbers() -> list[int]:
    return [int(path.name) for path in RUNS.glob("*") if path.name.isdecimal()] if RUNS.is_dir() else []


def check_name(folder: Path) -> None:
    """Raises ValueError for a path under which Orbax does not find again what it wrote: it reads it as a pattern."""
    odd = sorted(set(str(folder.absolute())) & set(PATTERN))
    require(not odd, "out", str(folder), f"a path without {' '.join(odd)} (the checkpoints could not be read back)")


def release(folder: Path, held: Claim) -> None:
    """Gives a claimed folder back; removes it if it is still empty."""
    held.release()
    with suppress(OSError):
        folder.rmdir()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run. Raises ValueError if it is not there or not readable."""
    path = folder / CONFIG
    try:
        written = json.loads(path.read_text("utf-8"))
        return {**written, "config": from_flat(written["settings"])}
    except FileNotFoundError:
        raise ValueError(f"resume: must find a run, {path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: must be the settings of a run ({error})") from None


def write_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """model.safetensors, whole or not at all."""
    part = folder / ".model.safetensors"
    contiguous = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    part.write_bytes(to_safetensors(contiguous, metadata={"format": "pt"}))
    part.replace(folder / WEIGHTS)


def write_config(folder: Path, config: TrainConfig, about: dict[str, Any]) -> None:
    """Settings, model, text and the versions that made the run."""
    versions = {}
    for name in ("jax", "flax", "optax", "torch", "numpy", "jax-moe"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    content = {"settings": flat(config), **about, "versions": versions}
    metrics.write_whole(folder / CONFIG, json.dumps(content, indent=1) + "\n")


def is_finished(folder: Path) -> bool:
    """Whether the trained model is in it."""
    return any((folder / name).exists() for name in (WEIGHTS, "pretrained"))


def check_same(config: TrainConfig, saved: TrainConfig, where: Path) -> None:
    """Raises ValueError for a setting that a resumed run may not change. `steps` may grow where nothing decays."""
    here, there = flat(config), flat(saved)
    for name, value in here.items():
        longer = name == "steps" and saved.optimizer.decay == "none" and value > there[name]
        if name not in FREE_ON_RESUME and not longer:
            require(value == there[name], name, value, f"{there[name]!r} as in {where}, which --resume continues")
