"""Optimizer state both ways: torch.optim's `state_dict()` and optax's state tree, moments by name, as strict as weights.

AdamW's (and Adam's) `exp_avg`, `exp_avg_sq`, `step` are optax's `ScaleByAdamState(mu, nu, count)`; the `momentum_buffer` of
SGD is its `TraceState(trace)`. Wherever they sit in a chain, behind clipping or beside a schedule, they are found there;
in `optax.MultiSteps` too, between two steps: gradients that are half accumulated have no place in torch's state.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_moe.porting.api import flatten, from_torch_tree, to_torch
from jax_moe.porting.engine import PortError

ADAM = {"exp_avg": "mu", "exp_avg_sq": "nu"}  # torch's word: optax's
SGD = {"momentum_buffer": "trace"}
KINDS = "AdamW or Adam (step, exp_avg, exp_avg_sq) or SGD (momentum_buffer)"
FREE = ("params", "param_names", "foreach", "fused", "capturable", "differentiable", "initial_lr")  # groups may differ in these


@dataclass(frozen=True)
class Moments:
    """An optimizer's state by torch's names: {"exp_avg": {name: array}, ...}; empty where no step has been taken."""

    arrays: dict[str, dict[str, np.ndarray]]
    step: int | None  # None: SGD does not count
    step_dtype: str = "float32"  # of torch's counter


def optimizer_from_torch(
    layer: nnx.Module, state_dict: Mapping[str, Any], state: optax.OptState, *, names: Sequence[str] | None = None,
    step: int | None = None, layout: str | None = None,
) -> optax.OptState:
    """`state`, as the optax optimizer's `init` makes it, with torch's moments and step counts in their places.

    `names` are the parameters' names in the order in which the torch optimizer was given them, [name for name, _ in
    module.named_parameters()]; not needed where it was given the pairs. `step` counts for schedules beside SGD, which
    does not count itself; AdamW's own count serves AdamW's. Raises PortError with all that is missing, unexpected,
    misshapen or of another kind.
    """
    read = read_state_dict(state_dict, names)
    _check_groups(state_dict["param_groups"])
    if read.step is not None and step not in (None, read.step):
        raise ValueError(f"step={step}: must be left out, the optimizer has taken {read.step}")
    count = read.step if read.step is not None else step
    trees, errors = {}, {}
    for word, arrays in read.arrays.items():
        try:
            trees[word] = flatten(from_torch_tree(layer, arrays, layout=layout))
        except PortError as error:
            errors[word] = error
    if errors:
        raise _together("optimizer state", errors)
    return fill(state, trees, count)


def optimizer_to_torch(
    layer: nnx.Module, state: optax.OptState, like: Mapping[str, Any], *, names: Sequence[str] | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """A `state_dict` for the torch optimizer whose own is `like`: its hyperparameters and order, optax's moments and count.

    `names` as in `optimizer_from_torch`. A schedule's place stays with torch's scheduler, whose `last_epoch` is the count.
    Raises PortError if the two optimizers or their parameters differ.
    """
    order = _order(like, names)
    trees, step = moments_of(state)
    _same_kind(like["param_groups"][0], list(trees))
    named = {word: to_torch(layer, tree, layout=layout) for word, tree in trees.items()}
    for word, arrays in named.items():
        error = PortError(
            f"optimizer state ({word})", missing=[name for name in arrays if name not in order],
            unexpected=[name for name in order if name not in arrays],
        )
        if error:
            raise error
    return write_state_dict(Moments(named, step), like["param_groups"], order)


def read_state_dict(state_dict: Mapping[str, Any], names: Sequence[str] | None = None) -> Moments:
    """Moments by name. Raises ValueError with everything that is wrong: other kinds, missing moments, steps that differ."""
    order = _order(state_dict, names)
    entries = dict(zip(order, (state_dict["state"].get(i, {}) for i in _indices(state_dict)), strict=True))
    held = {key for entry in entries.values() for key, value in entry.items() if value is not None}
    if not held:
        return Moments({}, 0 if "betas" in state_dict["param_groups"][0] else None)
    kind = next((kind for kind in (ADAM, SGD) if kind.keys() & held), None)
    steps = {name: int(entry["step"]) for name, entry in entries.items() if entry.get("step") is not None}
    if kind is None or held - kind.keys() - ({"step"} if kind is ADAM else set()):
        raise ValueError(f"optimizer state holds {', '.join(sorted(map(str, held)))}: must be that of {KINDS}")
    words = [*kind, "step"] if kind is ADAM else list(kind)
    most = max(steps.values(), default=0)
    error = PortError(
        "optimizer state",
        missing=[f"{word} of {name}" for word in words for name, entry in entries.items() if entry.get(word) is None],
        wrong=[f"step of {name} is {step}, must be {most} as of the others" for name, step in steps.items() if step != most],
    )
    if error:
        raise error
    arrays = {word: {name: _numpy(entry[word]) for name, entry in entries.items()} for word in kind}
    counter = _numpy(next(iter(entries.values())).get("step", 0)).dtype
    return Moments(arrays, most if kind is ADAM else None, counter.name if counter.kind == "f" else "float32")


def write_state_dict(moments: Moments, groups: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """The reverse of `read_state_dict`, with tensors, as `optimizer.load_state_dict` takes it."""
    from jax_moe.porting.torch_files import numpy_to_tensor

    if moments.step is not None and int(np.dtype(moments.step_dtype).type(moments.step)) != moments.step:
        raise ValueError(f"step={moments.step}: must be a number that torch's counter, a {moments.step_dtype}, can hold")
    indices = [i for group in groups for i in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for i, name in zip(indices, order, strict=True):
        entry = {} if moments.step is None else {"step": numpy_to_tensor(np.asarray(moments.step, moments.step_dtype))}
        state[i] = entry | {word: numpy_to_tensor(arrays[name]) for word, arrays in moments.arrays.items()}
    groups = [{key: list(value) if key == "params" else value for key, value in group.items()} for group in groups]
    return {"state": state if moments.arrays else {}, "param_groups": groups}


def moments_of(state: optax.OptState) -> tuple[dict[str, Any], int | None]:
    """The moments' trees in an optax state under torch's words, and AdamW's count. Raises ValueError for what torch lacks."""
    found: list[Any] = []

    def see(node: Any) -> Any:
        found.append(node)
        return node

    _walk(state, see)
    held = [node for node in found if isinstance(node, optax.ScaleByAdamState | optax.TraceState)]
    if len(held) > 1:
        raise ValueError(f"optax state has {' and '.join(type(node).__name__ for node in held)}: must have one of them")
    counts = [_count_of(node) for node in found if not isinstance(node, optax.TraceState)]
    steps = sorted(set(counts))
    if len(steps) > 1:
        raise ValueError(f"optax state counts {' and '.join(map(str, steps))} steps: must be the same throughout")
    words = {} if not held else ADAM if isinstance(held[0], optax.ScaleByAdamState) else SGD
    return {theirs: getattr(held[0], ours) for theirs, ours in words.items()}, steps[0] if words is ADAM else None


def _count_of(node: Any) -> int:
    """The steps that a node has counted. Raises ValueError in the middle of one."""
    if not isinstance(node, optax.MultiStepsState):
        return int(node.count)
    half = int(node.mini_step)
    if half:
        raise ValueError(f"optax state MultiSteps, mini_step={half}: must be 0; gradients half accumulated are not carried")
    return int(node.gradient_step)


def fill(state: optax.OptState, trees: Mapping[str, Mapping[str, np.ndarray]], count: int | None) -> optax.OptState:
    """The state with every moment and count in its place; nothing of torch's may be left over."""
    kind, used = (ADAM if "exp_avg" in trees else SGD), []

    def counted(like: Any) -> jax.Array:
        if count is None:
            raise ValueError("step=None: must say how many steps the schedule has made, SGD does not count them")
        return jnp.asarray(count, like.dtype)

    def put(node: Any) -> Any:
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=counted(node.count))
        if isinstance(node, optax.MultiStepsState):
            _count_of(node)
            return node._replace(gradient_step=counted(node.gradient_step))
        used.append(type(node).__name__)
        own = ADAM if isinstance(node, optax.ScaleByAdamState) else SGD
        if not trees:  # no step taken: as `init` made it
            return node
        if own is not kind:
            raise ValueError(f"optimizer state of torch is {' and '.join(kind)}: must fit optax's, which has {used[-1]}")
        filled = {ours: _like(getattr(node, ours), trees[theirs], theirs) for theirs, ours in own.items()}
        return node._replace(**filled, **({"count": counted(node.count)} if own is ADAM else {}))

    filled = _walk(state, put)
    if trees and len(used) != 1:
        has = " and ".join(used) or "neither ScaleByAdamState nor TraceState"
        raise ValueError(f"optimizer state of torch is {' and '.join(kind)}: must fit optax's, which has {has}")
    return filled


def _walk(node: Any, visit: Callable[[Any], Any]) -> Any:
    """The state with what `visit` makes of moments' and schedules' states. Raises ValueError for a state it does not know."""
    if isinstance(node, optax.ScaleByAdamState | optax.TraceState | optax.ScaleByScheduleState):
        return visit(node)
    if isinstance(node, optax.MultiStepsState):
        inner = _walk(node.inner_opt_state, visit)
        return visit(node)._replace(inner_opt_state=inner)
    if isinstance(node, optax.EmptyState) or not jax.tree.leaves(node):
        return node
    if type(node) is tuple:  # a chain
        return tuple(_walk(one, visit) for one in node)
    raise ValueError(f"optax state {type(node).__name__}: must be of adamw, sgd, or chains of these with clipping and schedules")


def _like(tree: Any, arrays: Mapping[str, np.ndarray], word: str) -> Any:
    """The arrays in the tree's structure, dtypes and places."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = {_path(keys): leaf for keys, leaf in leaves}
    error = PortError(
        f"optimizer state ({word})",
        missing=[name for name in named if name not in arrays], unexpected=[name for name in arrays if name not in named],
        misshapen=[f"{n} is {arrays[n].shape}, must be {v.shape}" for n, v in named.items() if _differ(arrays, n, v, "shape")],
        mistyped=[f"{n} is {arrays[n].dtype}, must be {v.dtype}" for n, v in named.items() if _differ(arrays, n, v, "dtype")],
    )
    if error:
        raise error
    return jax.tree.unflatten(structure, [_place(arrays[name], leaf) for name, leaf in named.items()])


def _differ(arrays: Mapping[str, np.ndarray], name: str, like: Any, what: str) -> bool:
    return name in arrays and getattr(arrays[name], what) != getattr(like, what)


def _place(value: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    spread = sharding is not None and len(sharding.device_set) > 1
    return jax.device_put(value, sharding) if spread else jnp.array(value)


def _path(keys: tuple) -> str:
    """Our name of a leaf; the step from an nnx Variable to its value has none."""
    steps = [key for key in keys if not isinstance(key, jax.tree_util.GetAttrKey)]
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in steps)


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        from jax_moe.porting.torch_files import tensor_to_numpy

        return tensor_to_numpy(value)
    return np.asarray(value)


def _order(state_dict: Mapping[str, Any], names: Sequence[str] | None) -> list[str]:
    """The parameters' names by the optimizer's numbers. Raises ValueError if they do not fit, or nobody says them."""
    fits = isinstance(state_dict, Mapping) and isinstance(state_dict.get("state"), Mapping) and state_dict.get("param_groups")
    if not fits:
        raise ValueError("optimizer state: must be what torch.optim's state_dict() returns, with state and param_groups")
    indices = _indices(state_dict)
    stored = [name for group in state_dict["param_groups"] for name in group.get("param_names", ())]
    names = list(names) if names is not None else stored
    if not names:
        raise ValueError("names=None: must be the parameters' names in the optimizer's order, which it was not given itself")
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


def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for hyperparameters that one optax optimizer does not have."""
    first = groups[0]
    for number, group in enumerate(groups[1:], 1):
        both = (first.keys() | group.keys()) - set(FREE)
        differ = [f"{key} ({first.get(key)} and {group.get(key)})" for key in sorted(both) if first.get(key) != group.get(key)]
        if differ:
            raise ValueError(f"param_groups 0 and {number} differ in {', '.join(differ)}: must be the same in all")
    for key, allowed in (("amsgrad", False), ("maximize", False), ("dampening", 0)):
        if first.get(key, allowed) != allowed:
            raise ValueError(f"{key}={first[key]}: must be {allowed}, optax keeps no such state")


def _same_kind(group: Mapping[str, Any], words: list[str]) -> None:
    _check_groups([group])
    adam = "betas" in group
    if words != (list(ADAM) if adam else list(SGD) if group.get("momentum") else []):
        kind = "AdamW or Adam" if adam else f"SGD with momentum={group.get('momentum')}"
        raise ValueError(f"optax state is {' and '.join(words) or 'no moments'}: must fit torch's optimizer, {kind}")


def _together(where: str, errors: Mapping[str, PortError]) -> PortError:
    """One error of several, every name with its moment's."""

    def named(kind: str) -> Iterable[str]:
        return [f"{word} of {one}" for word, error in errors.items() for one in getattr(error, kind)]

    kinds = ("missing", "unexpected", "misshapen", "mistyped", "wrong")
    return PortError(where, **{kind: named(kind) for kind in kinds})
