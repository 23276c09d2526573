"""The content of samples: a digest of every array under its original name, including a run's optimizer moments."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe.porting.checkpoint import load

CHECKPOINTS = (
    "makemoe", "makemoe_layer_bf16", "mixtral_fp16", "moe", "soft_moe_orbax", "switch", "qwen2_moe", "qwen2_moe_orbax",
    "granitemoe", "granitemoe_orbax", "run_finished",
)
TRAINING = "training"  # a checkpoint with optimizer state
RUNS = ("run_stopped", "run_torch", "tuned_stopped")


def digests(root: Path) -> dict[str, dict[str, str]]:
    """{sample: {name: digest}} of all samples; runs are resumed, so that `root` should be a copy."""
    found = {name: checkpoint(root / name) for name in CHECKPOINTS}
    found[TRAINING] = training(root / TRAINING)
    return found | {name: run(root / name) for name in RUNS}


def checkpoint(path: Path) -> dict[str, str]:
    """The digests of a folder that `jax-moe` reads."""
    return _digests(load(path).state())


def training(path: Path) -> dict[str, str]:
    """The digests of weights, moments and step."""
    read = load(path, with_optimizer=True)
    assert read.optimizer is not None
    moments = {
        f"{word} {name}": a for word, arrays in read.optimizer.moments.arrays.items() for name, a in arrays.items()
    }
    return _digests({**read.state(), **moments, "step": np.asarray(read.optimizer.moments.step)})


def run(folder: Path) -> dict[str, str]:
    """The digests of a stopped run as its framework restores it: weights, moments and step."""
    from moe_train.loop import prepare, read_settings

    made = prepare(*read_settings(["--resume", "--out", str(folder)]))
    learner: Any = made.learner
    step = {"step": np.asarray(made.start)}
    if made.config.framework == "torch":
        moments = {
            f"{word} {i}": entry[word].numpy() for i, entry in learner.optimizer.state_dict()["state"].items()
            for word in ("exp_avg", "exp_avg_sq")
        }
        return _digests({**learner.weights(), **moments, **step})
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(learner.state)
    }
    named = {re.sub(r"^optimizer\..*?\.(mu|nu)\.", r"\1 ", name): leaf for name, leaf in leaves.items()}
    return _digests({name: leaf for name, leaf in named.items() if name.startswith(("params.", "mu ", "nu "))} | step)


def _digests(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {
        name: hashlib.sha256(f"{a.dtype}{a.shape}".encode() + np.ascontiguousarray(a).tobytes()).hexdigest()[:16]
        for name, a in sorted(arrays.items())
    }
