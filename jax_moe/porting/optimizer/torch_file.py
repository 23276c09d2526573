"""torch.optim's state beside weights: in a trainer's file, in a Hugging Face folder's `optimizer.pt`, or in our folder.

`optimizer.pt` is torch.optim's state_dict(), as transformers' Trainer writes it into a checkpoint. It numbers the
parameters: their names are those that the optimizer got (`param_names`), or follow from the order of transformers'
modules.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.hf_folder import OPTIMIZER as TORCH_FILE
from jax_moe.porting.optimizer.groups import names_in_groups
from jax_moe.porting.optimizer.own_file import FILE, Optimizer, plain, plain_groups, read_optimizer, write_optimizer
from jax_moe.porting.optimizer.state import read_state_dict, verify_moments, write_state_dict
from jax_moe.porting.optimizer.step_counts import expert_tensors
from jax_moe.porting.state_dict import from_torch_tree, tree_plan


def optimizer_of(found: Found, module: nnx.Module) -> Optimizer:
    """The optimizer state beside the weights of `module`.

    Raises ValueError with everything that does not fit the weights.
    """
    layout = layout_of(found)
    if found.dictionary is not None:
        return _of_file(found, module, layout)
    try:
        if found.kind != "hf":
            return read_optimizer(found.optimizer, module, layout)
        from jax_moe.porting.formats.torch_pickle import read_optimizer_pt

        order = found.family.parameter_order(tree_plan(module, layout=layout))
        return from_state_dict(read_optimizer_pt(found.optimizer), module, layout, order)
    except ValueError as error:
        if not found.decoder:
            raise
        said = str(error).removeprefix(f"{found.optimizer}: ")
        raise ValueError(f"{found.optimizer}: {said} (move it away to carry the weights alone)") from None


def layout_of(found: Found) -> str:
    """The names under which a torch optimizer has the parameters: those of the reference in memory."""
    if found.decoder:
        return found.family.in_memory(found.config).name
    assert found.family.state is not None
    return found.family.state.table.name


def from_state_dict(
    state_dict: Mapping[str, Any], module: nnx.Module, layout: str, order: list[str],
    others: dict[str, Any] | None = None,
) -> Optimizer:
    """The state in torch.optim's own form; `order` are the model's parameters as the reference numbers them."""
    plan = tree_plan(module, layout=layout)
    names = names_in_groups(state_dict, order, plan.their_shapes)
    moments = read_state_dict(state_dict, names, expert_tensors(plan))
    for arrays in moments.arrays.values():
        from_torch_tree(module, arrays, layout=layout)
    return Optimizer(moments, plain_groups(state_dict["param_groups"]), names, others or {})


def _of_file(found: Found, module: nnx.Module, layout: str) -> Optimizer:
    """The optimizer state of a trainer's file, whose state dict has the parameters in the optimizer's order."""
    assert found.dictionary is not None
    shapes = tree_plan(module, layout=layout).their_shapes
    order = [name for name in found.tensors if name in shapes]
    others = {name: value for name, value in _beside(found).items() if isinstance(name, str) and plain(value)}
    try:
        return from_state_dict(found.optimizer, module, layout, order, others)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from None


def left_out(found: Found) -> list[str]:
    """The other entries of a trainer's file that JSON cannot hold."""
    return sorted(str(name) for name, value in _beside(found).items() if not (isinstance(name, str) and plain(value)))


def _beside(found: Found) -> dict[Any, Any]:
    others = {} if found.dictionary is None else found.dictionary.others
    return {name: value for name, value in others.items() if name not in ("model", "optimizer")}


def write_beside(part: Path, to: str, optimizer: Optimizer, module: nnx.Module, layout: str) -> None:
    """Writes the optimizer state into a folder, "hf" or "orbax". Raises ValueError unless it reads back bit for bit."""
    if to == "orbax":
        write_optimizer(part / FILE, optimizer, module, layout)
        return
    from jax_moe.porting.formats.torch_pickle import read_optimizer_pt, write_plain_pt

    file = part / TORCH_FILE
    write_plain_pt(file, write_state_dict(optimizer.moments, optimizer.groups, optimizer.order))
    verify_torch(optimizer, read_optimizer_pt(file), module, layout, file)


def verify_torch(optimizer: Optimizer, again: Mapping[str, Any], module: nnx.Module, layout: str, where: Path) -> None:
    """Raises ValueError unless torch's state dict as read again holds the same, bit for bit."""
    experts = expert_tensors(tree_plan(module, layout=layout))
    verify_moments(optimizer.moments, read_state_dict(again, optimizer.order, experts), where)
