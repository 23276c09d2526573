"""Calls on a mesh with Explicit axes, where the sharding of an array is part of its type.

Programs here are written for Auto axes, which XLA splits: under Explicit ones gathers, sorts and slices of split arrays
raise. A decorated call has Auto axes inside (`jax.sharding.auto_axes`), and its answers are laid out as its input.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jax_moe.shapes import role_and_dims
from jax_moe.sharding.inside import alone_together

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")
Decorator = Callable[[Callable[Parameters, Answer]], Callable[Parameters, Answer]]


def auto_inside(main: str, *answers: str) -> Decorator:
    """A decorator for calls with an input `main`, such as "x_BTD", which runs them with Auto axes.

    The `answers` are fields of what the call returns, such as "y_BTD", or the one array that it returns: they are split
    over Explicit axes in the dims that they share with the input, as the input is. All else is whole on every device.
    Without Explicit axes it is the call itself.
    """

    def decorated(call: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
        form = signature(call)

        @wraps(call)
        def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
            axes = explicit_axes()
            if not axes:
                return call(*args, **kwargs)
            axis_of = _axes_of(main, form.bind(*args, **kwargs).arguments[main])
            splits = {name: PartitionSpec(*map(axis_of.get, role_and_dims(name)[1])) for name in answers}
            return _run(call, args, kwargs, axes, splits)

        return run

    return decorated


def explicit_axes() -> tuple[str, ...]:
    """The Explicit axes of the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def _axes_of(name: str, value: Any) -> dict[str, Any]:
    """{dim: the axes it is split over} of the input; the call itself refuses what is no array of that rank."""
    dims = role_and_dims(name)[1]
    if not _is_array(value) or value.ndim != len(dims):
        return {}
    return dict(zip(dims, jax.typeof(value).sharding.spec, strict=False))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _run(call: Callable, args: Any, kwargs: Any, axes: tuple[str, ...], splits: dict[str, PartitionSpec]) -> Any:
    """The call's answer. Arrays, weights too, go in and come out by the name of their split; all else passes by."""
    leaves, form = jax.tree.flatten((args, kwargs))
    found: list[tuple[Any, Any]] = []
    shape: Any = None
    alone = next(iter(splits), "")  # a single array is the answer named first

    def inside(arrays: list) -> dict[str, list]:
        nonlocal found, shape
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(form, [next(given) if _is_array(leaf) else leaf for leaf in leaves])
        args = [alone_together(each) if isinstance(each, nnx.Module) else each for each in args]
        found, shape = jax.tree_util.tree_flatten_with_path(call(*args, **kwargs))
        by_name: dict[str, list] = {name: [] for name in (*splits, "")}
        for keys, leaf in found:
            if _is_array(leaf):
                by_name[_named(keys, alone, splits)].append(leaf)
        return by_name

    wanted = {**splits, "": PartitionSpec()}
    by_name = jax.sharding.auto_axes(inside, axes=axes, out_sharding=wanted)(list(filter(_is_array, leaves)))
    rest = {name: iter(arrays) for name, arrays in by_name.items()}
    return jax.tree.unflatten(
        shape, [next(rest[_named(keys, alone, splits)]) if _is_array(leaf) else leaf for keys, leaf in found]
    )


def _named(keys: tuple, alone: str, splits: dict[str, PartitionSpec]) -> str:
    """The split of a leaf of the answer; "" for whole."""
    name = getattr(keys[0], "name", "") if keys else alone
    return name if name in splits else ""
