"""Optimizer state in both directions: torch.optim's `state_dict()` and optax's state tree, by name, as strict as
weights.

`exp_avg`, `exp_avg_sq` and `step` of AdamW and Adam are optax's `ScaleByAdamState(mu, nu, count)`; the
`momentum_buffer` of SGD is `TraceState(trace)`. They are found anywhere in a chain, behind clipping or beside a
schedule, and in `optax.MultiSteps` between two steps (torch's state has no place for half accumulated gradients).
Experts without tokens take no step in PyTorch: their step counts fit the state of `adamw_as_torch(...,
unchosen="skip")`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx

from jax_moe.disk import same_bits
from jax_moe.porting.errors import PortError, check_names
from jax_moe.porting.optimizer.groups import check_groups
from jax_moe.porting.optimizer.optax_state import ADAM, SGD, fill, moments_of
from jax_moe.porting.optimizer.step_counts import counts_of, expert_tensors, own_steps_of
from jax_moe.porting.state_dict import flatten, from_torch_tree, to_numpy, to_torch, tree_plan

KINDS = "AdamW or Adam (step, exp_avg, exp_avg_sq) or SGD (momentum_buffer)"


@dataclass(frozen=True)
class Moments:
    """An optimizer's state by torch's names: {"exp_avg": {name: array}, ...}; empty before the first step."""

    arrays: dict[str, dict[str, np.ndarray]]
    step: int | None  # None: SGD does not count
    step_dtype: str = "float32"  # of torch's counter
    # Steps of expert parameters whose count is not `step`; 0 for SGD's without momentum.
    own_steps: dict[str, int] = field(default_factory=dict)


def optimizer_from_torch(
    layer: nnx.Module, state_dict: Mapping[str, Any], state: optax.OptState, *, names: Sequence[str] | None = None,
    step: int | None = None, layout: str | None = None,
) -> optax.OptState:
    """`state`, the result of the optax optimizer's `init`, filled with torch's moments and step counts.

    `names` are the parameters' names in the order in which the torch optimizer got them, [name for name, _ in
    module.named_parameters()]; leave them out if it got (name, parameter) pairs. `step` is the count for schedules
    beside SGD, which has no count; AdamW has its own. Groups that differ in weight decay need a state of
    `optax.adamw(mask=...)`. Hyperparameters, also injected hyperparameters, stay those that the optax optimizer was
    made with. Experts without tokens, with fewer steps than the rest or no entry, need a state of `adamw_as_torch(...,
    unchosen="skip")`. Raises PortError with everything that is missing, unexpected, misshapen or of another kind.
    """
    plan = tree_plan(layer, _order(state_dict, names), layout)
    read = read_state_dict(state_dict, names, expert_tensors(plan))
    check_groups(state_dict["param_groups"], state)
    if read.step is not None and step not in (None, read.step):
        raise ValueError(f"step={step}: must be left out, the optimizer has taken {read.step}")
    trees, errors = {}, {}
    for word, arrays in read.arrays.items():
        try:
            trees[word] = flatten(from_torch_tree(layer, arrays, layout=layout))
        except PortError as error:
            errors[word] = error
    if errors:
        raise _together("optimizer state", errors)
    if read.step is None:
        return fill(state, trees, step)
    return fill(state, trees, read.step, counts_of(plan, read.own_steps, read.step))


def optimizer_to_torch(
    layer: nnx.Module, state: optax.OptState, like: Mapping[str, Any], *, names: Sequence[str] | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """A torch `state_dict` with optax's moments and counts, and with the hyperparameters and order of the state dict
    `like`.

    `names` and `layout` as in `optimizer_from_torch`; without a layout the layout nearest to the names is used. A
    schedule's count is not part of it: torch's scheduler keeps it as `last_epoch`. A parameter without steps has no
    entry, as in torch. Raises PortError if the two optimizers or their parameters differ.
    """
    order = _order(like, names)
    plan = tree_plan(layer, order, layout)
    trees, step, counts = moments_of(state)
    check_groups(like["param_groups"][:1])
    _same_kind(like["param_groups"][0], list(trees))
    named = {word: to_torch(layer, tree, layout=plan.table.name) for word, tree in trees.items()}
    for word, arrays in named.items():
        check_names(f"optimizer state ({word})", dict.fromkeys(order), dict.fromkeys(arrays))
    own_steps = {} if step is None else own_steps_of(plan, counts, step)
    return write_state_dict(Moments(named, step, own_steps=own_steps), like["param_groups"], order)


def read_state_dict(
    state_dict: Mapping[str, Any], names: Sequence[str] | None = None,
    experts: Mapping[str, tuple[int, ...]] | None = None,
) -> Moments:
    """Moments by name. Raises ValueError with everything that is wrong: another kind, missing moments, unequal steps.

    `experts` {name: shape} may have taken fewer steps than the others. An expert without an entry has taken none, and
    its moments are zero: for SGD a momentum of zero and none are the same.
    """
    order = _order(state_dict, names)
    entries = dict(zip(order, (state_dict["state"].get(i, {}) for i in _indices(state_dict)), strict=True))
    kind = _kind_of(entries)
    if kind is None:
        return Moments({}, 0 if "betas" in state_dict["param_groups"][0] else None)
    own = {name: experts[name] for name in order if name in experts} if experts else {}
    untouched = _untouched(own, entries, kind)
    entries |= untouched
    steps = {name: int(entry["step"]) for name, entry in entries.items() if entry.get("step") is not None}
    most = max((step for name, step in steps.items() if name not in own), default=max(steps.values(), default=0))
    _check_entries(entries, kind, {name: step for name, step in steps.items() if name not in own}, most)
    arrays = {word: {name: to_numpy(entry[word]) for name, entry in entries.items()} for word in kind}
    if kind is SGD:
        return Moments(arrays, None, own_steps=dict.fromkeys(untouched, 0))
    own_steps = {name: steps[name] for name in own if steps[name] != most}
    return Moments(arrays, most, _counter_dtype(entries[max(steps, key=lambda name: steps[name])]), own_steps)


def _kind_of(entries: Mapping[str, Mapping[str, Any]]) -> Mapping[str, str] | None:
    """ADAM or SGD, by what the entries hold; None if they are empty. Raises ValueError for other optimizers."""
    held = {key for entry in entries.values() for key, value in entry.items() if value is not None}
    if not held:
        return None
    kind = next((kind for kind in (ADAM, SGD) if kind.keys() & held), None)
    if kind is None or held - kind.keys() - ({"step"} if kind is ADAM else set()):
        raise ValueError(f"optimizer state holds {', '.join(sorted(map(str, held)))}: must be that of {KINDS}")
    return kind


def _check_entries(
    entries: Mapping[str, Mapping[str, Any]], kind: Mapping[str, str], steps: Mapping[str, int], most: int
) -> None:
    """Raises PortError for moments that an entry lacks, and for those of `steps` that are not `most`."""
    words = [*kind, "step"] if kind is ADAM else list(kind)
    error = PortError(
        "optimizer state",
        missing=[f"{word} of {name}" for word in words for name, entry in entries.items() if entry.get(word) is None],
        wrong=[
            f"step of {name} is {step}, must be {most} as of the others" for name, step in steps.items() if step != most
        ],
    )
    if error:
        raise error


def _counter_dtype(entry: Mapping[str, Any]) -> str:
    """The dtype of the entry's step counter; for a plain integer float32, which is torch's default."""
    dtype = to_numpy(entry["step"]).dtype
    return dtype.name if dtype.kind == "f" else "float32"


def _untouched(
    experts: Mapping[str, tuple[int, ...]], entries: Mapping[str, Mapping[str, Any]], kind: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Entries of the experts without steps: zeros in the dtype of another expert's moments, or of any parameter's."""
    like = next(entries[name] for name in (*experts, *entries) if entries[name])
    step = {"step": 0} if kind is ADAM else {}
    dtypes = {word: to_numpy(like[word]).dtype for word in kind if like.get(word) is not None}
    return {
        name: {**step, **{word: np.zeros(shape, dtype) for word, dtype in dtypes.items()}}
        for name, shape in experts.items() if not entries[name]
    }


def write_state_dict(moments: Moments, groups: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """The reverse of `read_state_dict`, with tensors, for `optimizer.load_state_dict`; no entry for no step."""
    from jax_moe.porting.torch_tensors import numpy_to_tensor

    for most in () if moments.step is None else {moments.step, *moments.own_steps.values()}:
        if int(np.dtype(moments.step_dtype).type(most)) != most:
            raise ValueError(f"step={most}: must be a number that torch's counter, a {moments.step_dtype}, can hold")
    indices = [i for group in groups for i in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for i, name in zip(indices, order, strict=True):
        step = moments.own_steps.get(name, moments.step)
        if step == 0:
            continue
        entry = {} if step is None else {"step": numpy_to_tensor(np.asarray(step, moments.step_dtype))}
        state[i] = entry | {word: numpy_to_tensor(arrays[name]) for word, arrays in moments.arrays.items()}
    groups = [{key: list(value) if key == "params" else value for key, value in group.items()} for group in groups]
    return {"state": state if moments.arrays else {}, "param_groups": groups}


def _order(state_dict: Mapping[str, Any], names: Sequence[str] | None) -> list[str]:
    """The parameters' names in the optimizer's order. Raises ValueError if they do not fit or are unknown."""
    whole = isinstance(state_dict, Mapping) and isinstance(state_dict.get("state"), Mapping)
    if not whole or not state_dict.get("param_groups"):
        allowed = "what torch.optim's state_dict() returns, with state and param_groups"
        raise ValueError(f"optimizer state: must be {allowed}")
    indices = _indices(state_dict)
    stored = [name for group in state_dict["param_groups"] for name in group.get("param_names", ())]
    names = list(names) if names is not None else stored
    if not names:
        raise ValueError("names=None: must be the parameters' names in the optimizer's order; the state has none")
    odd = [i for i in state_dict["state"] if i not in set(indices)]
    if len(names) != len(indices) or len(set(names)) != len(names) or odd or (stored and stored != names):
        raise ValueError(
            f"names: must be {len(indices)} different names in the optimizer's order; {len(names)} are given"
            + (f", it holds state of {len(odd)} parameters outside its groups" if odd else "")
            + (f", its own begin with {stored[0]}" if stored and stored != names else "")
        )
    return names


def _indices(state_dict: Mapping[str, Any]) -> list[int]:
    return [i for group in state_dict["param_groups"] for i in group["params"]]


def _same_kind(group: Mapping[str, Any], words: list[str]) -> None:
    adam = "betas" in group
    if words != (list(ADAM) if adam else list(SGD) if group.get("momentum") else []):
        kind = "AdamW or Adam" if adam else f"SGD with momentum={group.get('momentum')}"
        raise ValueError(f"optax state is {' and '.join(words) or 'no moments'}: must fit torch's optimizer, {kind}")


def _together(where: str, errors: Mapping[str, PortError]) -> PortError:
    """A single error from several, with each name after the word for its moments."""

    def named(kind: str) -> Iterable[str]:
        return [f"{word} of {name}" for word, error in errors.items() for name in getattr(error, kind)]

    kinds = ("missing", "unexpected", "misshapen", "mistyped", "wrong")
    return PortError(where, **{kind: named(kind) for kind in kinds})


def verify_moments(written: Moments, read: Moments, path: Path) -> None:
    """Raises ValueError, naming the differences, unless both are the same bit for bit."""
    wrong = [
        f"{word} of {name}" for word, arrays in written.arrays.items() for name, value in arrays.items()
        if not same_bits(value, read.arrays[word][name])
    ]
    if wrong or (read.step, read.own_steps) != (written.step, written.own_steps):
        raise ValueError(f"{path}: must read back as written; differs in {', '.join([*wrong, 'step'][:20])}")
