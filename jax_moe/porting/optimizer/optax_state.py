"""Moments and step counts in the tree of an optax state: found wherever they sit, filled, and read again.

Behind clipping or beside a schedule, in a chain, under masks (`optax.masked`, `optax.partition`, `adamw(mask=...)`), with
injected hyperparameters, and in `optax.MultiSteps` between two steps.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_moe.porting.errors import PortError
from jax_moe.porting.optimizer.step_counts import HINT, unequal
from jax_moe.porting.state_dict import flatten
from jax_moe.unchosen import AccumulatedState, SkippingAdamState, flat_counts, nested_counts, path_of

ADAM = {"exp_avg": "mu", "exp_avg_sq": "nu"}  # torch's word: optax's
SGD = {"momentum_buffer": "trace"}
ADAM_STATES = (optax.ScaleByAdamState, SkippingAdamState)
INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
Counts = Mapping[str, np.ndarray]  # {path of experts: their steps}


def moments_of(state: optax.OptState) -> tuple[dict[str, dict[str, np.ndarray]], int | None, dict[str, np.ndarray]]:
    """Moments by our paths under torch's words, AdamW's count, and the experts' own. ValueError for what torch lacks."""
    found: list[Any] = []

    def see(node: Any) -> Any:
        found.append(node)
        return node

    walk(state, see)
    held = [node for node in found if isinstance(node, (*ADAM_STATES, optax.TraceState))]
    kinds = {_words(node) is ADAM for node in held}
    trees: dict[str, dict[str, np.ndarray]] = {}
    names: Counter[str] = Counter()
    for node in held:
        parts = {theirs: flatten(getattr(node, ours)) for theirs, ours in _words(node).items()}
        for word, arrays in parts.items():
            trees.setdefault(word, {}).update(arrays)
        names.update(list(next(iter(parts.values()))))
    if len(kinds) > 1 or any(count > 1 for count in names.values()):
        raise ValueError(f"optax state has {' and '.join(type(node).__name__ for node in held)}: must have one of them")
    steps = sorted({_count_of(node) for node in found if not isinstance(node, optax.TraceState)})
    if len(steps) > 1:
        raise ValueError(f"optax state counts {' and '.join(map(str, steps))} steps: must be the same throughout")
    counts = {
        path: np.asarray(value) for node in held if isinstance(node, SkippingAdamState)
        for path, value in flat_counts(node.expert_counts).items()
    }
    return trees, steps[0] if kinds == {True} else None, counts


def fill(
    state: optax.OptState, trees: Mapping[str, Mapping[str, np.ndarray]], count: int | None, counts: Counts | None = None
) -> optax.OptState:
    """The state with every moment and count in its place; nothing of torch's may be left over."""
    kind, used = (ADAM if "exp_avg" in trees else SGD), []
    placed: Counter[str] = Counter()

    def put(node: Any) -> Any:
        if not isinstance(node, (*ADAM_STATES, optax.TraceState)):
            return _recount(node, count)
        used.append(type(node).__name__)
        own = _words(node)
        if not trees:  # no step taken: as `init` made it
            return node
        if own is not kind:
            raise ValueError(f"optimizer state of torch is {' and '.join(kind)}: must fit optax's, which has {used[-1]}")
        filled = {ours: _like(getattr(node, ours), trees[theirs], theirs) for theirs, ours in own.items()}
        placed.update(_named(getattr(node, next(iter(own.values())))).keys())
        node = node._replace(**filled)
        return node if own is SGD else _with_counts(node, count, counts or {})

    filled = walk(state, put)
    if trees and (not used or max(placed.values(), default=0) > 1):
        has = " and ".join(used) or "neither ScaleByAdamState nor TraceState"
        raise ValueError(f"optimizer state of torch is {' and '.join(kind)}: must fit optax's, which has {has}")
    error = PortError("optimizer state", unexpected=[f"{w} of {n}" for w, one in trees.items() for n in one if n not in placed])
    if error:
        raise error
    return filled


def holds(state: optax.OptState, kind: type | tuple[type, ...]) -> bool:
    """Whether a node of this kind is somewhere in the state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return any(isinstance(node, kind) for node in nodes)


def walk(node: Any, visit: Callable[[Any], Any]) -> Any:
    """The state with what `visit` makes of every state that counts or holds moments. ValueError for one it does not know."""
    if isinstance(node, (*ADAM_STATES, optax.TraceState)) or _only_counts(node):
        return visit(node)
    if isinstance(node, AccumulatedState):
        empty = jax.tree.map(jnp.zeros_like, node.chosen)
        return node._replace(chosen=empty, steps=_multi_steps(node.steps, visit))
    if isinstance(node, optax.MultiStepsState):
        if holds(node.inner_opt_state, SkippingAdamState):
            raise ValueError("optax state MultiStepsState: must be jax_moe.unchosen.accumulated's around unchosen='skip'")
        return _multi_steps(node, visit)
    if isinstance(node, INJECTED):
        scheduled = {name: walk(one, visit) for name, one in getattr(node, "hyperparams_states", {}).items()}
        replaced = {"hyperparams_states": scheduled} if scheduled else {}
        return visit(node)._replace(inner_state=walk(node.inner_state, visit), **replaced)
    if isinstance(node, optax.MaskedState):
        return node._replace(inner_state=walk(node.inner_state, visit))
    if isinstance(node, optax.MultiTransformState):  # of optax.partition
        return node._replace(inner_states={label: walk(one, visit) for label, one in node.inner_states.items()})
    if isinstance(node, optax.EmptyState) or not jax.tree.leaves(node):
        return node
    if type(node) is tuple:  # a chain
        return tuple(walk(one, visit) for one in node)
    raise ValueError(f"optax state {type(node).__name__}: must be of adamw, sgd, or chains of these with clipping and schedules")


def _multi_steps(node: optax.MultiStepsState, visit: Callable[[Any], Any]) -> optax.MultiStepsState:
    inner = walk(node.inner_opt_state, visit)
    return visit(node)._replace(inner_opt_state=inner)


def _words(node: Any) -> dict[str, str]:
    return ADAM if isinstance(node, ADAM_STATES) else SGD


def _only_counts(node: Any) -> bool:
    """The states of schedules, optax's own and those inside injected hyperparameters."""
    return getattr(node, "_fields", None) == ("count",)


def _count_of(node: Any) -> int:
    """The steps that a node has counted. Raises ValueError in the middle of one."""
    if not isinstance(node, optax.MultiStepsState):
        return int(node.count)
    half = int(node.mini_step)
    if half:
        raise ValueError(f"optax state MultiSteps, mini_step={half}: must be 0; gradients half accumulated are not carried")
    return int(node.gradient_step)


def _recount(node: Any, count: int | None) -> Any:
    """A schedule's, accumulation's or injection's state at that count."""
    if count is None:
        raise ValueError("step=None: must say how many steps the schedule has made, SGD does not count them")
    _count_of(node)
    field = "gradient_step" if isinstance(node, optax.MultiStepsState) else "count"
    return node._replace(**{field: jnp.asarray(count, getattr(node, field).dtype)})


def _with_counts(node: Any, count: int | None, counts: Counts) -> Any:
    """Adam's state at that count. Raises ValueError where experts have counts of their own and it has no place for them."""
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
    return node._replace(expert_counts=nested_counts(filled))


def _like(tree: Any, arrays: Mapping[str, np.ndarray], word: str) -> Any:
    """The arrays in the tree's structure, dtypes and places; a masked tree takes those it has a place for."""
    named = _named(tree)
    error = PortError(
        f"optimizer state ({word})",
        missing=[name for name in named if name not in arrays],
        misshapen=[f"{n} is {arrays[n].shape}, must be {v.shape}" for n, v in named.items() if _differ(arrays, n, v, "shape")],
        mistyped=[f"{n} is {arrays[n].dtype}, must be {v.dtype}" for n, v in named.items() if _differ(arrays, n, v, "dtype")],
    )
    if error:
        raise error
    return jax.tree.unflatten(jax.tree.structure(tree), [_place(arrays[name], leaf) for name, leaf in named.items()])


def _named(tree: Any) -> dict[str, Any]:
    """{our path: leaf}."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _differ(arrays: Mapping[str, np.ndarray], name: str, like: Any, what: str) -> bool:
    return name in arrays and getattr(arrays[name], what) != getattr(like, what)


def _place(value: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    spread = sharding is not None and len(sharding.device_set) > 1
    return jax.device_put(value, sharding) if spread else jnp.array(value)
