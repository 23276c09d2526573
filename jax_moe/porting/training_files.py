"""Training checkpoints on disk: weights with the optimizer's state, as a `.pt` file of PyTorch or as a folder of ours.

In a folder `optimizer.safetensors` stands beside the weights: moments under our paths behind torch's word for them
(`exp_avg.blocks.moe.experts.up`); hyperparameters, step count and the order of the parameters in its metadata.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jax_moe.porting.about import is_folder
from jax_moe.porting.api import flatten, from_torch_tree, to_torch
from jax_moe.porting.checkpoint import LAYOUTS, Checkpoint, checkpoint_of, load, save
from jax_moe.porting.files import PT_SUFFIXES, read_safetensors, same_bits, verify, write_safetensors, writing
from jax_moe.porting.optimizer_state import Moments, read_state_dict, write_state_dict
from jax_moe.porting.recognise import Choices

FILE = "optimizer.safetensors"
KEY = "optimizer"  # of its metadata


@dataclass(frozen=True)
class Training:
    """A checkpoint with its optimizer's state, by torch's names."""

    checkpoint: Checkpoint
    moments: Moments
    groups: list[dict[str, Any]]  # torch's param_groups
    order: list[str]  # the parameters' names, as the groups count them
    others: dict[str, Any]  # what else stood in the file, as far as it is plain
    left_out: list[str]  # and what is not


def holds_training(path: Path) -> bool:
    """Whether it is a folder with an optimizer's state, or a `.pt` file of a model's and an optimizer's."""
    if path.is_dir():
        return is_folder(path) and (path / FILE).is_file()
    if path.suffix not in PT_SUFFIXES or not path.is_file():
        return False
    from jax_moe.porting.torch_files import is_training_pt

    return is_training_pt(path)


def read_training(path: Path, choices: Choices, *, allow_nonfinite: bool = False) -> Training:
    """Either form. Raises ValueError with everything in which the optimizer's state does not fit the weights."""
    if path.is_dir():
        return _read_folder(path, load(path, choices, allow_nonfinite=allow_nonfinite))
    from jax_moe.porting.torch_files import read_training_pt

    whole = read_training_pt(path)
    if whole is None:
        raise ValueError(f"{path}: must hold the state dicts \"model\" and \"optimizer\"")
    checkpoint = checkpoint_of(path, whole["model"], choices, allow_nonfinite=allow_nonfinite)
    try:
        names = _parameters(checkpoint)
        order = [name for name in whole["model"] if name in names]
        moments = read_state_dict(whole["optimizer"], order)
        for arrays in moments.arrays.values():
            from_torch_tree(checkpoint.module, arrays, layout=LAYOUTS[checkpoint.family])
        groups = _plain_groups(whole["optimizer"]["param_groups"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    rest = {name: value for name, value in whole.items() if name not in ("model", "optimizer")}
    others = {name: value for name, value in rest.items() if _plain(value)}
    return Training(checkpoint, moments, groups, order, others, sorted(map(str, rest.keys() - others.keys())))


def write_training_folder(training: Training, path: Path, overwrite: bool) -> None:
    """A folder as `checkpoint.save` writes it, with the optimizer's state; whole or not at all, once it reads back."""
    module, layout = training.checkpoint.module, LAYOUTS[training.checkpoint.family]
    arrays = {
        f"{word}.{name}": value for word, named in training.moments.arrays.items()
        for name, value in flatten(from_torch_tree(module, named, layout=layout)).items()
    }
    about = {
        "step": training.moments.step, "step_dtype": training.moments.step_dtype, "groups": training.groups,
        "order": training.order, "others": training.others, "words": list(training.moments.arrays),
    }
    with writing(path, overwrite, replaceable=is_folder) as part:
        save(training.checkpoint, part)
        write_safetensors(part / FILE, arrays, {KEY: json.dumps(about)})
        verify(arrays, read_safetensors(part / FILE), path)


def write_training_file(training: Training, path: Path, overwrite: bool) -> None:
    """The `.pt` file; whole or not at all, once it reads back."""
    from jax_moe.porting.torch_files import read_training_pt, write_training_pt

    state = _in_order(training.checkpoint.state(), training.order)
    optimizer = write_state_dict(training.moments, training.groups, training.order)
    with writing(path, overwrite) as part:
        write_training_pt(part, {"model": state, "optimizer": optimizer, **training.others})
        again = read_training_pt(part)
        assert again is not None
        verify(state, again["model"], path)
        found = read_state_dict(again["optimizer"], training.order)
        wrong = [
            f"{word} of {name}" for word, arrays in training.moments.arrays.items() for name, value in arrays.items()
            if not same_bits(value, found.arrays[word][name])
        ]
        if wrong or found.step != training.moments.step:
            raise ValueError(f"{path}: must read back as written; differs in {', '.join([*wrong, 'step'][:20])}")


def _read_folder(path: Path, checkpoint: Checkpoint) -> Training:
    from safetensors import safe_open

    file = path / FILE
    arrays = read_safetensors(file)
    try:
        with safe_open(file, framework="np") as opened:
            about = json.loads((opened.metadata() or {})[KEY])
        groups = [{key: tuple(value) if key == "betas" else value for key, value in group.items()} for group in about["groups"]]
        step, step_dtype, words = about["step"], np.dtype(about["step_dtype"]).name, list(about["words"])
        order, others = list(about["order"]), dict(about["others"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: must say step, groups, order and words in its metadata ({error!r})") from None
    try:
        odd = [name for name in arrays if name.split(".")[0] not in words]
        if odd or set(order) != _parameters(checkpoint):
            wrong = ", ".join(odd[:5]) or "order"
            raise ValueError(f"must hold {' and '.join(words)} of the model's parameters; not so: {wrong}")
        moments = {
            word: to_torch(checkpoint.module, _behind(f"{word}.", arrays), layout=LAYOUTS[checkpoint.family]) for word in words
        }
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return Training(checkpoint, Moments(moments, step, step_dtype), groups, order, others, [])


def _behind(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _parameters(checkpoint: Checkpoint) -> set[str]:
    """Torch's names of what is trained: no masks, no buffers."""
    params = nnx.state(checkpoint.module, nnx.Param)
    return set(to_torch(checkpoint.module, params, layout=LAYOUTS[checkpoint.family]))


def _plain_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    odd = [f"{key}={value!r:.40}" for group in groups for key, value in group.items() if key != "betas" and not _plain(value)]
    if odd:
        raise ValueError(f"param_groups: {', '.join(odd)}: must be plain numbers, strings and lists")
    return groups


def _plain(value: Any) -> bool:
    """Whether JSON gives it back as it is."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RuntimeError):
        return False


def _in_order(state: dict[str, np.ndarray], order: list[str]) -> dict[str, np.ndarray]:
    """The state dict with its parameters in the optimizer's order: whoever reads the file takes that order from it."""
    rest = iter(order)
    wanted = set(order)
    names = [next(rest) if name in wanted else name for name in state]
    return {name: state[name] for name in names}
