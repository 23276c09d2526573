"""Training checkpoints on disk: weights with the optimizer's state, as a `.pt` file of PyTorch or as a folder of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.disk import verify, writing
from jax_moe.porting.checkpoint import LAYOUTS, Checkpoint, checkpoint_of, known, load, save
from jax_moe.porting.formats.own_folder import is_folder
from jax_moe.porting.formats.state_file import PT_SUFFIXES
from jax_moe.porting.formats.wrapped import own_names
from jax_moe.porting.optimizer.groups import names_in_groups
from jax_moe.porting.optimizer.own_file import FILE, Optimizer, plain, plain_groups, read_optimizer, write_optimizer
from jax_moe.porting.optimizer.state import read_state_dict, verify_moments, write_state_dict
from jax_moe.porting.optimizer.step_counts import expert_tensors
from jax_moe.porting.recognise import Choices
from jax_moe.porting.state_dict import from_torch_tree, tree_plan


@dataclass(frozen=True)
class Training:
    """A checkpoint with its optimizer's state."""

    checkpoint: Checkpoint
    optimizer: Optimizer
    left_out: list[str]  # what else stood in the file and is not plain


def holds_training(path: Path) -> bool:
    """Whether it is a folder with an optimizer's state, or a `.pt` file of a model's and an optimizer's."""
    if path.is_dir():
        return is_folder(path) and (path / FILE).is_file()
    if path.suffix not in PT_SUFFIXES or not path.is_file():
        return False
    from jax_moe.porting.formats.torch_pickle import is_training_pt

    return is_training_pt(path)


def read_training(path: Path, choices: Choices, *, allow_nonfinite: bool = False) -> Training:
    """Either form. Raises ValueError with everything in which the optimizer's state does not fit the weights."""
    if path.is_dir():
        checkpoint = load(path, choices, allow_nonfinite=allow_nonfinite)
        return Training(checkpoint, read_optimizer(path / FILE, checkpoint.module, LAYOUTS[checkpoint.family]), [])
    from jax_moe.porting.formats.torch_pickle import read_whole_pt

    opened = read_whole_pt(path)
    if opened.optimizer is None:
        raise ValueError(f"{path}: must hold the state dicts \"model\" and \"optimizer\"")
    own, _ = own_names(opened.state, known)
    if any(name.startswith("model.layers.") for name in own.values()):
        here = "`model.save_pretrained(folder)` and `torch.save(optimizer.state_dict(), 'folder/optimizer.pt')`"
        raise ValueError(f"{path}: is of a Hugging Face model, whose config.json it lacks: must be a folder, made by {here}")
    note = None if opened.within == "model" else f'from "{opened.within}" of a dictionary'
    checkpoint = checkpoint_of(path, opened.state, choices, allow_nonfinite=allow_nonfinite, note=note)
    layout = LAYOUTS[checkpoint.family]
    try:
        plan = tree_plan(checkpoint.module, layout=layout)
        inside = [own[name] for name in opened.state if own[name] in plan.their_shapes]
        optimizer = _named(opened.optimizer, own)
        order = names_in_groups(optimizer, inside, plan.their_shapes)
        moments = read_state_dict(optimizer, order, expert_tensors(plan))
        for arrays in moments.arrays.values():
            from_torch_tree(checkpoint.module, arrays, layout=layout)
        groups = plain_groups(optimizer["param_groups"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    rest = {name: value for name, value in opened.others.items() if name not in ("model", "optimizer")}
    others = {name: value for name, value in rest.items() if isinstance(name, str) and plain(value)}
    return Training(checkpoint, Optimizer(moments, groups, order, others), sorted(map(str, rest.keys() - others.keys())))


def _named(optimizer: Any, own: Mapping[str, str]) -> dict[str, Any]:
    """The optimizer's state dict, the names in its groups without a wrapper's parts too."""
    groups = [
        {**group, "param_names": [own.get(name, name) for name in group["param_names"]]} if "param_names" in group else group
        for group in optimizer["param_groups"]
    ]
    return {**optimizer, "param_groups": groups}


def write_training_folder(training: Training, path: Path, overwrite: bool) -> None:
    """A folder as `checkpoint.save` writes it, with the optimizer's state; whole or not at all, once it reads back."""
    with writing(path, overwrite, replaceable=is_folder) as part:
        save(training.checkpoint, part)
        write_optimizer(part / FILE, training.optimizer, training.checkpoint.module, LAYOUTS[training.checkpoint.family])


def write_training_file(training: Training, path: Path, overwrite: bool) -> None:
    """The reverse: the file that was read."""
    from jax_moe.porting.formats.torch_pickle import read_training_pt, write_training_pt

    optimizer = training.optimizer
    state = _in_order(training.checkpoint.state(), optimizer.order)
    whole = {"model": state, "optimizer": write_state_dict(optimizer.moments, optimizer.groups, optimizer.order)}
    with writing(path, overwrite) as part:
        write_training_pt(part, {**whole, **optimizer.others})
        again = read_training_pt(part)
        assert again is not None
        verify(state, again["model"], path)
        experts = expert_tensors(tree_plan(training.checkpoint.module, layout=LAYOUTS[training.checkpoint.family]))
        verify_moments(optimizer.moments, read_state_dict(again["optimizer"], optimizer.order, experts), path)


def _in_order(state: dict[str, np.ndarray], order: list[str]) -> dict[str, np.ndarray]:
    """The state dict with its parameters in the optimizer's order: whoever reads the file takes that order from it."""
    rest = iter(order)
    wanted = set(order)
    names = [next(rest) if name in wanted else name for name in state]
    return {name: state[name] for name in names}
