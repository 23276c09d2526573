"""Defaults fitted to what the user asked for: a default that contradicts an explicit setting is changed silently.

Only the settings named in `free`, which the user did not give, change. Explicit values out of range are refused
elsewhere.
"""

import dataclasses
from collections.abc import Set
from fractions import Fraction
from math import ceil
from typing import Any

from moe_train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig, flat

Free = Set[str]
EXPLICIT: Free = frozenset()  # nothing may change
MOST_DEVICES = 4096  # more than any machine has


def given(arguments: list[str]) -> frozenset[str]:
    """The names of the settings that a command line gives."""
    names = {word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    known = set(flat(TrainConfig()))
    return frozenset(known & (names | {name.removeprefix("no_") for name in names}))


def changed(config: TrainConfig, free: Free, **values: Any) -> TrainConfig:
    """The configuration with `values` for the settings that are free, by the names of their flags."""
    values = {name: value for name, value in values.items() if name in free}
    parts: dict[str, Any] = {}
    for part, kind in (("model", ModelSettings), ("optimizer", OptimizerSettings)):
        own = {setting.name for setting in dataclasses.fields(kind)} & set(values)
        parts[part] = dataclasses.replace(getattr(config, part), **{name: values.pop(name) for name in own})
    return dataclasses.replace(config, **values, **parts)


def fit_settings(config: TrainConfig, free: Free) -> TrainConfig:
    """The configuration with defaults fitted to its explicit values."""
    model, optimizer, values = config.model, config.optimizer, dict[str, Any]()
    if optimizer.warmup_steps >= config.steps:
        values["warmup_steps"] = max(config.steps, 0) // 10
    if optimizer.decay == "none":
        values["final_learning_rate"] = 0.0
    elif optimizer.final_learning_rate > optimizer.learning_rate > 0:
        values["final_learning_rate"] = optimizer.learning_rate / 10
    if config.pretrained is None and config.init_from is None:
        if "num_heads" in free and model.model_dim > 0:
            most = min(model.num_heads, model.model_dim)
            values["num_heads"] = next(n for n in range(most, 0, -1) if model.model_dim % n == 0)
        values["top_k"] = min(model.top_k, max(model.num_experts, 1))
    devices = config.num_devices or _on_data_axis(config.mesh)
    if 1 < devices <= MOST_DEVICES and config.batch_size % devices:
        values["batch_size"] = -(-config.batch_size // devices) * devices
    return changed(config, free, **values)


def _on_data_axis(mesh: str | None) -> int:
    """The devices that share a batch."""
    if mesh is None:
        return 1
    from jax_moe.sharding.mesh import DATA_AXIS, read_mesh

    return read_mesh(mesh).get(DATA_AXIS, 1)


def fit_block(config: TrainConfig, free: Free, longest: int) -> TrainConfig:
    """The configuration with a block of at most `longest` tokens."""
    return changed(config, free, block_size=min(config.model.block_size, max(longest, 1)))


def fit_capacity(config: TrainConfig, free: Free) -> TrainConfig:
    """The configuration with a capacity of at least one slot per expert: the least multiple of 1/4 that gives it."""
    model = config.model
    tokens = config.batch_size * model.block_size
    refused = min(tokens, model.top_k, model.num_experts) < 1
    if refused or model.capacity_factor is None or not model.capacity_factor > 0:
        return config
    least = Fraction(model.num_experts, tokens * model.top_k)
    if Fraction(model.capacity_factor) >= least:
        return config
    return changed(config, free, capacity_factor=ceil(least * 4) / 4)
