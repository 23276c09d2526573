"""Moments and step counts in the tree of an optax state, read and filled.

They are found behind clipping or beside a schedule, in a chain, under masks (`optax.masked`, `optax.partition`,
`adamw(mask=...)`), with injected hyperparameters, and in `optax.MultiSteps` between two steps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from jax_moe.parameters import path_of
from jax_moe.porting.errors import PortError, check_names
from jax_moe.porting.optimizer.step_counts import HINT, unequal
from jax_moe.porting.state_dict import flatten
from jax_moe.unchosen import AccumulatedState, SkippingAdamState, flat_counts

ADAM = {"exp_avg": "mu", "exp_avg_sq": "nu"}  # torch's key: optax's field
SGD = {"momentum_buffer": "trace"}
ADAM_STATES = (optax.ScaleByAdamState, SkippingAdamState)
MOMENTS = (*ADAM_STATES, optax.TraceState)
INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
Trees = Mapping[str, Mapping[str, np.ndarray]]  # {torch's key: {our path: moment}}
Counts = Mapping[str, np.ndarray]  # {path of the experts: their steps}


def moments_of(state: optax.OptState) -> tuple[dict[str, dict[str, np.ndarray]], int | None, dict[str, np.ndarray]]:
    """Moments by torch's key and our path, AdamW's count, and the experts' own counts.

    Raises ValueError for states that torch has no counterpart of.
    """
    nodes = _nodes_of(state)
    holders = [node for node in nodes if isinstance(node, MOMENTS)]
    if len({tuple(_words(node)) for node in holders}) > 1 or _held_twice(holders):
        raise ValueError(f"optax state has {_type_names(holders)}: must have one of them")
    steps = sorted({_count_of(node) for node in nodes if not isinstance(node, optax.TraceState)})
    if len(steps) > 1:
        raise ValueError(f"optax state counts {' and '.join(map(str, steps))} steps: must be the same throughout")
    trees: dict[str, dict[str, np.ndarray]] = {}
    for node in holders:
        for word, field in _words(node).items():
            trees.setdefault(word, {}).update(flatten(getattr(node, field)))
    counts = {
        path: np.asarray(value) for node in holders if isinstance(node, SkippingAdamState)
        for path, value in flat_counts(node.expert_counts).items()
    }
    is_adam = any(isinstance(node, ADAM_STATES) for node in holders)
    return trees, steps[0] if is_adam else None, counts


def fill(
    state: optax.OptState, trees: Trees, count: int | None, counts: Counts | None = None
) -> optax.OptState:
    """The state with every moment and count in its place; without moments (no step taken) only counts are set.

    Raises ValueError for moments of torch that the state has no place for, and for places that get none.
    """
    holders = [node for node in _nodes_of(state) if isinstance(node, MOMENTS)]
    if trees:
        _check_kind(holders, trees)

    def visit(node: Any) -> Any:
        if not isinstance(node, MOMENTS):
            return _recount(node, count)
        return _with_moments(node, trees, count, counts or {}) if trees else node

    filled = walk(state, visit)
    placed = set(_held_paths(holders))
    left = [f"{word} of {path}" for word, arrays in trees.items() for path in arrays if path not in placed]
    if left:
        raise PortError("optimizer state", unexpected=left)
    return filled


def _check_kind(holders: Sequence[Any], trees: Trees) -> None:
    """Raises ValueError unless the states hold moments of torch's kind, each parameter's once."""
    kind = ADAM if "exp_avg" in trees else SGD
    if not holders or any(_words(node) is not kind for node in holders) or _held_twice(holders):
        has = _type_names(holders) or "neither ScaleByAdamState nor TraceState"
        raise ValueError(f"optimizer state of torch is {' and '.join(kind)}: must fit optax's, which has {has}")


def _with_moments(node: Any, trees: Trees, count: int | None, counts: Counts) -> Any:
    filled = {field: _like(getattr(node, field), trees[word], word) for word, field in _words(node).items()}
    node = node._replace(**filled)
    return node if isinstance(node, optax.TraceState) else _with_counts(node, count, counts)


def _nodes_of(state: optax.OptState) -> list[Any]:
    """Every state within that counts or holds moments."""
    found: list[Any] = []

    def see(node: Any) -> Any:
        found.append(node)
        return node

    walk(state, see)
    return found


def _held_paths(holders: Sequence[Any]) -> list[str]:
    """Our paths of the parameters whose moments these states hold."""
    return [path for node in holders for path in _named(getattr(node, next(iter(_words(node).values()))))]


def _held_twice(holders: Sequence[Any]) -> bool:
    paths = _held_paths(holders)
    return len(set(paths)) < len(paths)


def _type_names(nodes: Sequence[Any]) -> str:
    return " and ".join(type(node).__name__ for node in nodes)


def holds(state: optax.OptState, kind: type | tuple[type, ...]) -> bool:
    """Whether a node of this kind is somewhere in the state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return any(isinstance(node, kind) for node in nodes)


def walk(node: Any, visit: Callable[[Any], Any]) -> Any:
    """The state with `visit(node)` in place of every node that counts or holds moments.

    Raises ValueError for a node of an unknown kind.
    """
    if isinstance(node, MOMENTS) or _only_counts(node):
        return visit(node)
    if isinstance(node, AccumulatedState):
        empty = jax.tree.map(jnp.zeros_like, node.chosen)
        return node._replace(chosen=empty, steps=_multi_steps(node.steps, visit))
    if isinstance(node, optax.MultiStepsState):
        if holds(node.inner_opt_state, SkippingAdamState):
            allowed = "jax_moe.unchosen.accumulated's around unchosen='skip'"
            raise ValueError(f"optax state MultiStepsState: must be {allowed}")
        return _multi_steps(node, visit)
    if isinstance(node, INJECTED):
        scheduled = {name: walk(inner, visit) for name, inner in getattr(node, "hyperparams_states", {}).items()}
        replaced = {"hyperparams_states": scheduled} if scheduled else {}
        return visit(node)._replace(inner_state=walk(node.inner_state, visit), **replaced)
    if isinstance(node, optax.MaskedState):
        return node._replace(inner_state=walk(node.inner_state, visit))
    if isinstance(node, optax.MultiTransformState):  # of optax.partition
        return node._replace(inner_states={label: walk(inner, visit) for label, inner in node.inner_states.items()})
    if isinstance(node, optax.EmptyState) or not jax.tree.leaves(node):
        return node
    if type(node) is tuple:  # a chain
        return tuple(walk(link, visit) for link in node)
    allowed = "of adamw, sgd, or chains of these with clipping and schedules"
    raise ValueError(f"optax state {type(node).__name__}: must be {allowed}")


def _multi_steps(node: optax.MultiStepsState, visit: Callable[[Any], Any]) -> optax.MultiStepsState:
    inner = walk(node.inner_opt_state, visit)
    return visit(node)._replace(inner_opt_state=inner)


def _words(node: Any) -> dict[str, str]:
    return ADAM if isinstance(node, ADAM_STATES) else SGD


def _only_counts(node: Any) -> bool:
    """Whether a node is the state of a schedule, optax's own or that of an injected hyperparameter."""
    return getattr(node, "_fields", None) == ("count",)


def _count_of(node: Any) -> int:
    """The steps that a node has counted. Raises ValueError in the middle of an accumulated step."""
    if not isinstance(node, optax.MultiStepsState):
        return int(node.count)
    half = int(node.mini_step)
    if half:
        why = "half accumulated gradients are not carried"
        raise ValueError(f"optax state MultiSteps, mini_step={half}: must be 0; {why}")
    return int(node.gradient_step)


def _recount(node: Any, count: int | None) -> Any:
    """The state of a schedule, of accumulation or of injected hyperparameters, at that count."""
    if count is None:
        raise ValueError("step=None: must say how many steps the schedule has made, SGD does not count them")
    _count_of(node)
    field = "gradient_step" if isinstance(node, optax.MultiStepsState) else "count"
    return node._replace(**{field: jnp.asarray(count, getattr(node, field).dtype)})


def _with_counts(node: Any, count: int | None, counts: Counts) -> Any:
    """Adam's state at that count. Raises ValueError where experts have counts of their own that it has no place for."""
    node = node._replace(count=jnp.asarray(count, node.count.dtype))
    if not isinstance(node, SkippingAdamState):
        wrong = unequal(counts, count)
        if wrong:
            raise PortError(f"optimizer state ({HINT})", wrong=wrong)
        return node
    own = flat_counts(node.expert_counts)
    given = {path: counts.get(path, np.full(value.shape, count, np.int64)) for path, value in own.items()}
    misfit = {path: value.shape for path, value in own.items() if given[path].shape != value.shape}
    if misfit:
        wrong = [f"steps of {path} are {given[path].shape}, must be {shape}" for path, shape in misfit.items()]
        raise PortError("optimizer state", wrong=wrong)
    filled = {path: _place(given[path].astype(value.dtype), value) for path, value in own.items()}
    return node._replace(expert_counts=unflatten_dict(filled, sep="."))


def _like(tree: Any, arrays: Mapping[str, np.ndarray], word: str) -> Any:
    """The arrays in the tree's structure, dtypes and shardings; a masked tree takes the arrays of its own leaves."""
    named = _named(tree)
    check_names(f"optimizer state ({word})", arrays, named, dtypes=True, spare=True)
    return jax.tree.unflatten(jax.tree.structure(tree), [_place(arrays[name], leaf) for name, leaf in named.items()])


def _named(tree: Any) -> dict[str, Any]:
    """{our path: leaf}."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _place(value: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    spread = sharding is not None and len(sharding.device_set) > 1
    return jax.device_put(value, sharding) if spread else jnp.array(value)
