"""Modules filled with numbers from numpy: equal on every machine, without compiling initialisers."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def filled(make: Callable[[], Module], seed: int = 0) -> Module:
    """The module of `make` with norms 1 and other parameters normal with deviation 1 / sqrt(rows)."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def fill(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        rows = leaf.shape[-2] if len(leaf.shape) > 1 else 10
        value = np.ones(leaf.shape) if path[-1] == "scale" else rng.normal(size=leaf.shape) * rows**-0.5
        return leaf.replace(jnp.asarray(value, leaf.dtype))

    flat = nnx.to_flat_state(state)
    return nnx.merge(graphdef, nnx.from_flat_state([(path, fill(path, leaf)) for path, leaf in flat]))
