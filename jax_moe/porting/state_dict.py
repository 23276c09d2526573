"""Modules and state dicts: `jax_moe.from_torch`, `jax_moe.to_torch` and their like for trees."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.config.models import DecoderConfig, Origin
from jax_moe.config.parameters import Declared
from jax_moe.models.decoder import Decoder
from jax_moe.parameters import declared, of_variable
from jax_moe.porting.errors import PortError, check_names
from jax_moe.porting.families import default_table, tables_of
from jax_moe.porting.table.plan import Plan, Shapes, check, make_plan, their_names, to_ours, to_theirs
from jax_moe.stored import kept_paths, stored_state, stored_variables

Module = TypeVar("Module", bound=nnx.Module)


def from_torch(layer: Module, state: Mapping[str, Any], *, layout: str | None = None, cast: bool = False) -> Module:
    """Loads a state dict of tensors or arrays into the layer, in place, and returns it.

    Strict: raises PortError with every missing, unexpected, misshapen and wrongly typed name; then nothing has
    changed. `layout` names the project whose names are used; None takes the layout whose names all match. `cast=True`
    converts to the parameters' dtypes; without it a differing dtype is an error.
    """
    arrays = {str(name): to_numpy(value) for name, value in state.items()}
    variables = stored_variables(layer)
    _refuse_far_larger(layer, variables, len(arrays))
    plan = _choose_plan(layer, declared(layer), set(arrays), layout)
    dtypes = {path: np.dtype(v.dtype) for path, v in variables.items()}
    where = f"cannot load into {type(layer).__name__} (layout {plan.table.name})"
    check(plan, arrays, where, None if cast else dtypes)
    ours = to_ours(plan, arrays)
    return _fill(layer, {path: value.astype(dtypes[path], copy=False) for path, value in ours.items()})


def _refuse_far_larger(layer: nnx.Module, variables: Mapping[str, nnx.Variable], there: int) -> None:
    """Raises ValueError if so many tensors are missing that listing them would take gigabytes."""
    here = sum(math.prod(v.shape[:-2]) for v in variables.values())  # a name for each layer, expert, head
    if here > 100 * (there + 100):
        name = type(layer).__name__
        raise ValueError(f"cannot load {there:,} tensors into {name}: its contract has about {here:,}")


def load_ours(layer: Module, weights: Mapping[str, np.ndarray]) -> Module:
    """Loads {our path: array} into the layer, in place; as strict as `from_torch`."""
    variables = stored_variables(layer)
    check_names(f"cannot load into {type(layer).__name__}", weights, variables, dtypes=True)
    return _fill(layer, weights)


def _fill(layer: Module, values: Mapping[str, np.ndarray]) -> Module:
    """Sets every variable to its checked value; on an error sets none."""
    flat = nnx.to_flat_state(stored_state(layer))
    new = [(keys, v.replace(_place(values[_path(keys)], v, _path(keys)))) for keys, v in flat]
    nnx.update(layer, nnx.from_flat_state(new))
    return layer


def to_torch(layer: nnx.Module, tree: Any = None, *, layout: str | None = None) -> dict[str, np.ndarray]:
    """{their name: contiguous numpy array} of the layer's weights, masks included.

    With a `tree` shaped like the layer's parameters (gradients, an optimizer's moments; nnx.State or nested dict) the
    arrays are the tree's, under the same names and without masks. Raises PortError if the tree does not fit.
    """
    variables = stored_variables(layer)
    table_name = layout or default_table(layer).name
    if tree is None:
        plan = _choose_plan(layer, declared(layer), None, layout)
        return to_theirs(plan, {path: np.asarray(v[...]) for path, v in variables.items()})
    arrays = flatten(tree)
    expected = _in_tree(variables, set(arrays))
    check_names(f"tree does not fit {type(layer).__name__} (layout {table_name})", arrays, expected)
    return to_theirs(_choose_plan(layer, expected, None, layout), arrays, constants=False)


def from_torch_tree(layer: nnx.Module, state: Mapping[str, Any], *, layout: str | None = None) -> dict[Any, Any]:
    """The inverse of `to_torch(layer, tree)`: a nested dict shaped like the layer's parameters, dtypes as given.

    Raises PortError, with all missing, unexpected and misshapen names.
    """
    arrays = {str(name): to_numpy(value) for name, value in state.items()}
    plan = tree_plan(layer, arrays, layout)
    check(plan, arrays, f"tree does not fit {type(layer).__name__} (layout {plan.table.name})", constants=False)
    ours = to_ours(plan, arrays)
    tree: dict[Any, Any] = {}
    for keys, v in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        node: dict[Any, Any] = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = _place(ours[_path(keys)], v, _path(keys))
    return tree


def their_shapes(layer: nnx.Module, layout: str) -> Shapes:
    """{their name: shape} of the layer's weights in that layout."""
    return _choose_plan(layer, declared(layer), None, layout).their_shapes


def tree_plan(layer: nnx.Module, names: Iterable[str] | None = None, layout: str | None = None) -> Plan:
    """The plan for gradients or moments of the layer: that of the layout, or the plan nearest to the names."""
    return _choose_plan(layer, _in_tree(stored_variables(layer), set()), None if names is None else set(names), layout)


def kept_names(layer: nnx.Module, names: Iterable[str], layout: str | None = None) -> frozenset[str]:
    """The names in a state dict whose variables keep their dtype."""
    return their_names(_choose_plan(layer, declared(layer), set(names), layout), kept_paths(layer))


def _choose_plan(layer: nnx.Module, ours: Mapping[str, Declared], names: set[str] | None, layout: str | None) -> Plan:
    """The named table's plan; else the first that covers all our weights or, given names, the plan nearest to them."""
    tables = tables_of(layer)
    if layout is not None:
        known = [table for table in tables if table.name == layout]
        if not known:
            allowed = ", ".join(repr(table.name) for table in tables)
            raise ValueError(f"layout={layout!r}: must be one of {allowed} for {type(layer).__name__}")
        return make_plan(known[0], ours)
    plans, errors = [], []
    for table in tables:
        try:
            plans.append(make_plan(table, ours))
        except PortError as error:
            errors.append(error)
            continue
        if names is None or plans[-1].names == names:
            return plans[-1]
    if not plans:
        raise errors[0]
    assert names is not None
    return min(plans, key=lambda plan: len(plan.names ^ names))


def _path(keys: tuple) -> str:
    return ".".join(map(str, keys))


def _in_tree(variables: dict[str, nnx.Variable], present: set[str]) -> dict[str, Declared]:
    """The parameters, and those other variables that the tree has."""
    return {path: of_variable(v) for path, v in variables.items() if isinstance(v, nnx.Param) or path in present}


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """{our path: array} of an nnx.State or a nested dict."""
    flat = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree)[0]
    return {".".join(_key(k) for k in keys if _key(k)): np.asarray(value) for keys, value in flat}


def _key(key: Any) -> str:
    """A step of a jax key path; the step from a Variable to its value has no name."""
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    if isinstance(key, jax.tree_util.SequenceKey):
        return str(key.idx)
    name = str(getattr(key, "name", getattr(key, "key", "")))
    return "" if name in ("value", "raw_value") else name


def to_numpy(value: Any) -> np.ndarray:
    """numpy with the same bits, from numpy, jax or (by its `detach`) torch."""
    if hasattr(value, "detach"):
        from jax_moe.porting.torch_tensors import tensor_to_numpy

        return tensor_to_numpy(value)
    return np.asarray(value)


def _place(value: np.ndarray, like: nnx.Variable, path: str) -> jax.Array:
    """A jax array on the devices of the variable. Raises PortError if jax would narrow fp64 to fp32."""
    sharding = getattr(like.get_value(), "sharding", None)
    # one device: stay uncommitted, as freshly made weights are
    spread = sharding is not None and len(sharding.device_set) > 1
    placed = jax.device_put(np.array(value), sharding) if spread else jnp.array(value)
    if placed.dtype != value.dtype:
        raise PortError("jax would narrow the dtype (jax_enable_x64 is off)", mistyped=[f"{path} is {value.dtype}"])
    return placed


def abstract_module(kind: type[Module], config: Any, dtype: np.dtype) -> Module:
    """The module with shapes and dtypes but no numbers yet; `from_torch` fills it."""
    return nnx.eval_shape(
        lambda: kind(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))  # type: ignore[call-arg]
    )


def abstract_decoder(config: DecoderConfig, origin: Origin | None = None) -> Decoder:
    """A decoder with shapes and dtypes but no numbers yet."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), origin=origin))
