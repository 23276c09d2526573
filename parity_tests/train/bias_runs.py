"""Fine-tuning steps that update a correction bias, on four virtual devices. Run as a program: a process has as many
devices as its first use of JAX found."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe.stored import kept_paths, stored_variables
from moe_train.configs import PRESETS
from moe_train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig, flat
from moe_train.learners.jax_learner import JaxLearner
from moe_train.task import make_learner, read_task
from parity_tests.shared.compare import MismatchError, check_exact

RATE, STEPS, STOP, TOKENS = 0.05, 4, 2, 12


def settings(folder: Path, devices: int) -> TrainConfig:
    """Four steps, large enough that the bias changes choices."""
    optimizer = OptimizerSettings(learning_rate=0.01, clip_norm=1.0, bias_update_rate=RATE)
    return dataclasses.replace(
        PRESETS["finetune"], pretrained=str(folder / "glm"), data=str(folder / "few.npy"), steps=STEPS, batch_size=4,
        num_devices=devices, model=ModelSettings(block_size=TOKENS), optimizer=optimizer,
    )


def made(folder: Path, devices: int) -> Any:
    """A learner with the folder's model."""
    config = settings(folder, devices)
    learner = make_learner(config, read_task(config))
    assert isinstance(learner, JaxLearner) and learner.mesh.size == devices
    return learner


def trained(learner: JaxLearner, steps: range) -> dict[str, np.ndarray]:
    """Every stored number after these steps, the optimizer's too; each step has batches of its own."""
    for step in steps:
        learner.train_step(step, np.random.default_rng(step).integers(0, 37, (4, TOKENS + 1), dtype=np.int32))
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(learner._stored())}


def biases(learner: JaxLearner) -> dict[str, np.ndarray]:
    """The correction biases by path."""
    module = learner.module()
    return {path: np.asarray(stored_variables(module)[path][...]) for path in kept_paths(module)}


@jax.jit
def experts(module: Any, tokens_BT: jax.Array) -> jax.Array:
    """The experts of every token, in every layer."""
    return module.run(tokens_BT).expert_LBTK


def by_hand(learner: JaxLearner, step: int) -> dict[str, np.ndarray]:
    """The biases after the next step: experts below the mean load gain RATE, those above it lose RATE."""
    tokens = np.random.default_rng(step).integers(0, 37, (4, TOKENS + 1), dtype=np.int32)
    chosen = np.asarray(experts(learner.module(), tokens[:, :-1]))
    ((path, before_LE),) = biases(learner).items()
    load_LE = np.stack([np.bincount(layer.ravel(), minlength=before_LE.shape[-1]) for layer in chosen])
    above = load_LE > load_LE.mean(axis=-1, keepdims=True)
    below = load_LE < load_LE.mean(axis=-1, keepdims=True)
    return {path: before_LE + np.float32(RATE) * (below.astype(np.float32) - above)}


def main(folder: Path) -> None:
    """Raises MismatchError unless resumed, split and hand-worked biases are equal bit for bit."""
    whole, resumed, alone = made(folder, 4), made(folder, 4), made(folder, 1)
    before = trained(whole, range(STOP))
    whole.save(folder / "checkpoints", STOP, flat(settings(folder, 4))).wait()
    after = trained(whole, range(STOP, STEPS))
    assert resumed.restore(folder / "checkpoints")[0] == STOP
    check_exact(trained(resumed, range(0)), before, "restored")
    check_exact(trained(resumed, range(STOP, STEPS)), after, "resumed on four devices")
    for step in range(STEPS):
        expected = by_hand(alone, step)
        trained(alone, range(step, step + 1))
        check_exact(biases(alone), expected, f"step {step} on one device")
    check_exact(biases(alone), biases(whole), "one device and four")
    assert {value.dtype.name for value in biases(whole).values()} == {"float32"}
    try:
        check_exact(biases(resumed), by_hand(resumed, STEPS), "a step too many")
    except MismatchError:
        return
    raise AssertionError("a step must move the biases")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
