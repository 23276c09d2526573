"""The output folder of a run: which one, may it be written, what it says of its settings."""

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from jax_moe.config import require
from train import metrics
from train.configs.settings import FREE_ON_RESUME, Start, TrainConfig, flat, from_flat

RUNS = Path("runs")
CONFIG = "config.json"


def choose(start: Start) -> Path:
    """The folder that `--out` names, or the next runs/NNN, or with --resume the newest runs/NNN."""
    if start.out is not None:
        return Path(start.out)
    numbers = [int(path.name) for path in RUNS.glob("*") if path.name.isdigit()] if RUNS.is_dir() else []
    if start.resume:
        require(bool(numbers), "resume", True, "used with --out FOLDER, or where runs/NNN exists")
        return RUNS / f"{max(numbers):03d}"
    return RUNS / f"{max(numbers, default=0) + 1:03d}"


def claim(folder: Path) -> None:
    """Makes the folder. Raises ValueError if it holds anything or cannot be written."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"out={str(folder)!r}: must be new or empty; --resume continues the run in it")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out={str(folder)!r}: must be a folder that can be written ({error.strerror})") from None


def release(folder: Path) -> None:
    """Removes a claimed folder that is still empty."""
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
    part.replace(folder / "model.safetensors")


def write_config(folder: Path, config: TrainConfig, about: dict[str, Any]) -> None:
    """Settings, model, text and the versions that made the run."""
    versions = {}
    for name in ("jax", "flax", "optax", "torch", "numpy", "jax-moe"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    content = {"settings": flat(config), **about, "versions": versions}
    metrics.write_whole(folder / CONFIG, json.dumps(content, indent=1) + "\n")


def check_same(config: TrainConfig, saved: TrainConfig, where: Path) -> None:
    """Raises ValueError for a setting that a resumed run may not change. `steps` may grow where nothing decays."""
    here, there = flat(config), flat(saved)
    for name, value in here.items():
        longer = name == "steps" and saved.optimizer.decay == "none" and value > there[name]
        if name not in FREE_ON_RESUME and not longer:
            require(value == there[name], name, value, f"{there[name]!r} as in {where}, which --resume continues")
