"""AdamW that does not move experts without tokens, as PyTorch's AdamW does where each expert is its own module.

In PyTorch the gradient of such an expert is None: it gets no decay, its moments stay, and its step count stands still.
In JAX experts are stacked and the gradient is zero. So `update` takes the mask of experts with tokens,
`chosen=chosen_experts(stats)`, and the state counts the steps of every expert. Which weights are experts' is what their
variables say: params are the state of a module, or plain arrays together with `declared(module)`.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_moe.config.checks import require
from jax_moe.config.parameters import Declared
from jax_moe.parameters import declared

Said = Mapping[str, Declared] | None
Experts = dict[str, tuple[str, int]]
NEEDS = "which experts had tokens: update(gradients, state, params, chosen=chosen_experts(stats))"


class SkippingAdamState(NamedTuple):
    """optax's `ScaleByAdamState` with a step count for every expert."""

    count: Any  # steps of all other parameters
    expert_counts: Any  # steps in which each expert had tokens, int32 [*L, E], nested under the path of the experts
    mu: Any
    nu: Any


class AccumulatedState(NamedTuple):
    """The state of `optax.MultiSteps` and the experts chosen so far in the current step."""

    chosen: Any  # bool [*L, E], nested like `expert_counts`
    steps: optax.MultiStepsState


def path_of(keys: tuple) -> str:
    """Our dotted name of a leaf; the attribute step from an nnx Variable to its value adds no part."""
    steps = [key for key in keys if not isinstance(key, jax.tree_util.GetAttrKey)]
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in steps)


def experts_in(ours: Mapping[str, Declared]) -> Experts:
    """{our path: (path of its experts, how many last dims belong to a single expert)} of the experts' weights."""
    own_dims = {path: one.letters[::-1].index("E") for path, one in ours.items() if one.role == "expert"}
    return {path: (path.rpartition(".")[0], count) for path, count in own_dims.items()}


def _experts(params: Any, said: Said) -> Experts:
    """As `experts_in`, by what was said or by the variables themselves. Raises ValueError for plain arrays alone."""
    if said is None:
        require(isinstance(params, nnx.State), "declared", None, "jax_moe.declared(module), as params are plain arrays")
        said = declared(params)
    return experts_in(said)


def flat_counts(nested: Any) -> dict[str, Any]:
    """{path of the experts: leaf [*L, E]} of a tree nested under these paths."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(nested)[0]}


def nested_counts(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flat_counts`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = value
    return tree


def _zeros(params: optax.Params, experts: Experts, dtype: Any) -> dict[str, Any]:
    """Zeros [*L, E], nested under the path of the experts."""
    leaves = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    shapes = {parent: leaves[path].shape[:-own_dims] for path, (parent, own_dims) in experts.items() if path in leaves}
    return nested_counts({path: jnp.zeros(shape, dtype) for path, shape in shapes.items()})


def _chosen(chosen: Any, like: Mapping[str, Any]) -> dict[str, Any]:
    """{path of the experts: bool [*L, E]}. Raises ValueError for masks that do not fit."""
    if not like:
        return {}
    require(chosen is not None, "chosen", None, NEEDS)
    given = flat_counts(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(like, jnp.asarray(chosen))
    wanted = {path: (value.shape, "bool") for path, value in like.items()}
    found = {path: (value.shape, str(value.dtype)) for path, value in given.items()}
    require(found == wanted, "chosen", found, f"{wanted}, {NEEDS}")
    return given


def _for_leaf(path: str, experts: Experts, leaf: Any, at: Mapping[str, Any], default: Any) -> Any:
    """For an expert weight the entry of `at`, shaped to broadcast against it; `default` for other leaves."""
    if path not in experts:
        return default
    parent, own_dims = experts[path]
    return at[parent].reshape(*leaf.shape[:-own_dims], *(1,) * own_dims)


def _correction(decay: float, count: Any) -> Any:
    """1 - decay^count in jax's widest float, by expm1: plain subtraction costs float32 half its digits."""
    count = jnp.maximum(count, 1).astype(jnp.result_type(float))  # the value for a count of 0 (never chosen) is unused
    return -jnp.expm1(count * (math.log(decay) if decay > 0 else -math.inf))


def _parts(decay: float, mask: Any, dtype: Any) -> tuple[Any, Any]:
    """Factors of the old moment and the gradient: decay and 1 - decay; 1 and 0 for experts without tokens."""
    if mask is None:
        return decay, 1 - decay
    return jnp.where(mask, decay, 1).astype(dtype), jnp.where(mask, 1 - decay, 0).astype(dtype)


def scale_by_skipping_adam(
    b1: float, b2: float, eps: float, said: Said = None
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` in which an expert without tokens keeps its moments and its count."""

    def init(params: optax.Params) -> SkippingAdamState:
        zeros = optax.tree.zeros_like
        counts = _zeros(params, _experts(params, said), jnp.int32)
        return SkippingAdamState(jnp.zeros([], jnp.int32), counts, zeros(params), zeros(params))

    def update(
        updates: optax.Updates, state: SkippingAdamState, params: optax.Params | None = None, *, chosen: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, SkippingAdamState]:
        before, experts = flat_counts(state.expert_counts), _experts(updates, said)
        masks = _chosen(chosen, before)
        count = state.count + 1
        counts = {path: value + masks[path].astype(value.dtype) for path, value in before.items()}

        def leaf(keys: tuple, gradient: Any, mu: Any, nu: Any) -> tuple[Any, Any, Any]:
            path = path_of(keys)
            steps, mask = (
                _for_leaf(path, experts, gradient, at, other) for at, other in ((counts, count), (masks, None))
            )
            # factors 1 and 0 keep the moments of experts without tokens: cheaper than `where` on all elements
            (old_mu, new_1), (old_nu, new_2) = (_parts(decay, mask, mu.dtype) for decay in (b1, b2))
            new_mu = new_1 * gradient + old_mu * mu
            new_nu = new_2 * gradient**2 + old_nu * nu
            mu_hat = new_mu / _correction(b1, steps).astype(mu.dtype)
            nu_hat = new_nu / _correction(b2, steps).astype(nu.dtype)
            return mu_hat / (jnp.sqrt(nu_hat) + eps), new_mu.astype(mu.dtype), new_nu.astype(nu.dtype)

        structure = jax.tree.structure(updates)
        each = jax.tree_util.tree_map_with_path(leaf, updates, state.mu, state.nu)
        scaled, mu, nu = jax.tree.transpose(structure, jax.tree.structure((0, 0, 0)), each)
        return scaled, SkippingAdamState(count, nested_counts(counts), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def only_chosen(said: Said = None) -> optax.GradientTransformationExtraArgs:
    """Sets the updates of experts without tokens to zero: neither decay nor momentum moves them."""

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None, *, chosen: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        experts = _experts(updates, said)
        masks = _chosen(chosen, flat_counts(jax.eval_shape(lambda: _zeros(updates, experts, bool))))

        def leaf(keys: tuple, value: Any) -> Any:
            mask = _for_leaf(path_of(keys), experts, value, masks, None)
            return value if mask is None else jnp.where(mask, value, 0)

        return jax.tree_util.tree_map_with_path(leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


def accumulated(
    optimizer: optax.GradientTransformation, parts: int, declared: Said = None
) -> optax.GradientTransformationExtraArgs:
    """`optax.MultiSteps` for an optimizer that takes `chosen`: an expert counts as chosen if any part chose it.

    `declared` as in `adamw_as_torch`. Gradients accumulate in jax's widest float; the default of `MultiSteps` is
    float32.
    """
    known = inspect.signature(optax.MultiSteps).parameters  # an older optax accumulates in the gradients' dtype
    wide = {"accumulator_dtype": jnp.result_type(float)} if "accumulator_dtype" in known else {}
    steps = optax.MultiSteps(optimizer, parts, **wide)

    def init(params: optax.Params) -> AccumulatedState:
        return AccumulatedState(_zeros(params, _experts(params, declared), bool), steps.init(params))

    def update(
        updates: optax.Updates, state: AccumulatedState, params: optax.Params | None = None, *, chosen: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AccumulatedState]:
        before = flat_counts(state.chosen)
        goes_on = state.steps.mini_step > 0
        so_far = {path: value | (before[path] & goes_on) for path, value in _chosen(chosen, before).items()}
        both = nested_counts(so_far)
        updates, inner = steps.update(updates, state.steps, params, chosen=both, **extra)
        return updates, AccumulatedState(both, inner)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]
