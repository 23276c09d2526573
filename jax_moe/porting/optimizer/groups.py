"""torch.optim's parameter groups: which of them an optax optimizer can hold, and the names of their parameters."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import optax

from jax_moe.porting.optimizer.optax_state import holds

# Groups may always differ in FREE. They may differ in BY_MASK if the optax state is that of `adamw(mask=...)`, and in
# BY_PARTITION if it is that of `optax.partition`.
FREE = ("params", "param_names", "foreach", "fused", "capturable", "differentiable", "initial_lr")
BY_MASK = ("weight_decay",)
BY_PARTITION = ("lr", "weight_decay", "betas", "eps")
# Names that transformers' Trainer puts into its group without decay.
NOT_DECAYED = r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"
TWO = "decay and no decay as transformers' Trainer or nanoGPT divide them"


def check_groups(groups: Sequence[Mapping[str, Any]], state: optax.OptState = ()) -> None:
    """Raises ValueError for hyperparameters that the optax optimizer with this state cannot have.

    In a masked tree groups may differ in weight decay, in a partitioned tree also in the learning rate. All values are
    those that the optax optimizer was made with.
    """
    first, masked = groups[0], holds(state, optax.MaskedState)
    allowed = BY_PARTITION if holds(state, optax.MultiTransformState) else BY_MASK if masked else ()
    for number, group in enumerate(groups[1:], 1):
        compared = sorted((first.keys() | group.keys()) - set(FREE) - set(allowed))
        different = [key for key in compared if first.get(key) != group.get(key)]
        differ = [f"{key} ({first.get(key)} and {group.get(key)})" for key in different]
        if differ:
            hint = ", or the optax state one of adamw(mask=...)" if different[0] == "weight_decay" else ""
            what = f"param_groups 0 and {number} differ in {', '.join(differ)}"
            raise ValueError(f"{what}: must be the same in all{hint}")
    for group in groups:
        for key, only in (("amsgrad", False), ("maximize", False), ("dampening", 0)):
            if group.get(key, only) != only:
                raise ValueError(f"{key}={group[key]}: must be {only}, optax keeps no such state")


def names_in_groups(state_dict: Any, order: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The parameters' names in the order in which the groups number them; `order` and `shapes` are the model's.

    Groups without names are a single group of all parameters, or two groups, with and without decay, divided by name
    (transformers' Trainer) or by rank (nanoGPT), whichever fits the moments' shapes. Raises ValueError for other
    groups.
    """
    groups: Any = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    whole = isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups)
    if not whole or not groups:
        raise ValueError("must be what torch.optim's state_dict() returns, with state and param_groups")
    named = [name for group in groups for name in group.get("param_names", ())]
    if named:
        return named
    sizes = [len(group["params"]) for group in groups]
    splits = _splits(order, shapes) if len(groups) == 2 else [[list(order)]]
    found = {tuple(chain(*split)) for split in splits if [len(names) for names in split] == sizes}
    indices = [i for group in groups for i in group["params"]]
    fitting = [names for names in found if _fits(state_dict, indices, names, shapes)]
    if len(fitting) == 1 or (len(found) == 1 and not fitting):  # the reader of the moments reports misfits
        return list((fitting or list(found))[0])
    lengths = (" and ".join(str(len(names)) for names in split) for split in _splits(order, shapes)[::2])
    two = " or ".join(dict.fromkeys(lengths))
    raise ValueError(
        f"param_groups of {' and '.join(map(str, sizes))} parameters: must be one of all {len(order)}, "
        f"the two of {TWO} ({two}), or named (torch.optim given model.named_parameters())"
    )


def _splits(order: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[list[list[str]]]:
    """The known divisions into two groups, each with the decaying group first and with it last."""
    by_name = {name for name in order if not re.search(NOT_DECAYED, name)}
    by_dims = {name for name in order if len(shapes[name]) >= 2}
    pairs = [
        [[name for name in order if name in decayed], [name for name in order if name not in decayed]]
        for decayed in (by_name, by_dims)
    ]
    return [groups for pair in pairs for groups in (pair, pair[::-1])]


def _fits(
    state_dict: Mapping[str, Any], indices: list[int], names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether every moment has the shape of its parameter, if these are the names."""
    for i, name in zip(indices, names, strict=True):
        entry = state_dict.get("state", {}).get(i, {})
        held = [value for key, value in entry.items() if key != "step" and hasattr(value, "shape")]
        if any(tuple(value.shape) != tuple(shapes[name]) for value in held):
            return False
    return True
