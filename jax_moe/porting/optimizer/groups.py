"""torch.optim's groups of parameters: which of them one optax optimizer can hold, and whose numbers stand for which names."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from jax_moe.porting.optimizer.optax_state import holds

FREE = ("params", "param_names", "foreach", "fused", "capturable", "differentiable", "initial_lr")  # groups may differ in these
BY_MASK = ("weight_decay",)  # and in these, where the optax state is one of `adamw(mask=...)`
BY_PARTITION = ("lr", "weight_decay", "betas", "eps")  # or of `optax.partition`
# transformers' Trainer has two groups: what decays, and what is named so.
NOT_DECAYED = r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"
TWO = "decay and no decay as transformers' Trainer or nanoGPT divide them"


def check_groups(groups: Sequence[Mapping[str, Any]], state: optax.OptState = ()) -> None:
    """Raises ValueError for hyperparameters that the optax optimizer with this state does not have.

    Where its tree is masked groups may differ in weight decay, where it is partitioned in the learning rate too: their
    values are those that optax was made with, as are all others.
    """
    first, masked = groups[0], holds(state, optax.MaskedState)
    allowed = BY_PARTITION if holds(state, optax.MultiTransformState) else BY_MASK if masked else ()
    for number, group in enumerate(groups[1:], 1):
        both = (first.keys() | group.keys()) - set(FREE) - set(allowed)
        differ = [f"{key} ({first.get(key)} and {group.get(key)})" for key in sorted(both) if first.get(key) != group.get(key)]
        if differ:
            hint = ", or the optax state one of adamw(mask=...)" if differ[0].startswith("weight_decay") else ""
            raise ValueError(f"param_groups 0 and {number} differ in {', '.join(differ)}: must be the same in all{hint}")
    for group in groups:
        for key, only in (("amsgrad", False), ("maximize", False), ("dampening", 0)):
            if group.get(key, only) != only:
                raise ValueError(f"{key}={group[key]}: must be {only}, optax keeps no such state")


def names_in_groups(state_dict: Any, order: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The parameters' names in the order in which the groups count them; `order` and `shapes` are the model's.

    Groups that know no names are one of all, or the two that decay and do not, by name (transformers' Trainer) or by number
    of dims (nanoGPT), whichever fits the moments' shapes. Raises ValueError for groups that nothing names.
    """
    groups: Any = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    whole = isinstance(groups, list) and all(isinstance(one, Mapping) and "params" in one for one in groups)
    if not whole or not groups:
        raise ValueError("must be what torch.optim's state_dict() returns, with state and param_groups")
    named = [name for group in groups for name in group.get("param_names", ())]
    if named:
        return named
    sizes = [len(group["params"]) for group in groups]
    splits = _splits(order, shapes) if len(groups) == 2 else [[list(order)]]
    found = {tuple(name for names in split for name in names) for split in splits if [len(names) for names in split] == sizes}
    fitting = [names for names in found if _fits(state_dict, [i for group in groups for i in group["params"]], names, shapes)]
    if len(fitting) == 1 or (len(found) == 1 and not fitting):  # what does not fit is told by whoever reads the moments
        return list((fitting or list(found))[0])
    two = " or ".join(dict.fromkeys(" and ".join(str(len(names)) for names in split) for split in _splits(order, shapes)[::2]))
    raise ValueError(
        f"param_groups of {' and '.join(map(str, sizes))} parameters: must be one of all {len(order)}, the two of {TWO} "
        f"({two}), or named (torch.optim given model.named_parameters())"
    )


def _splits(order: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[list[list[str]]]:
    """Every two groups that are known, each with what decays first and last."""
    by_name = {name for name in order if not re.search(NOT_DECAYED, name)}
    by_dims = {name for name in order if len(shapes[name]) >= 2}
    both = [[[n for n in order if n in decayed], [n for n in order if n not in decayed]] for decayed in (by_name, by_dims)]
    return [groups for pair in both for groups in (pair, pair[::-1])]


def _fits(state_dict: Mapping[str, Any], indices: list[int], names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every moment has the shape of the parameter that it would be of."""
    for i, name in zip(indices, names, strict=True):
        entry = state_dict.get("state", {}).get(i, {})
        held = [value for key, value in entry.items() if key != "step" and hasattr(value, "shape")]
        if any(tuple(value.shape) != tuple(shapes[name]) for value in held):
            return False
    return True
