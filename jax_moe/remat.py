"""Rematerialisation: which values of a layer are kept for the backward pass, and which are computed again."""

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import jax

from jax_moe.config.checks import require

Remat = Literal["none", "dots", "full"]
Layer = TypeVar("Layer", bound=Callable)


def rematerialised(layer: Layer, remat: Remat) -> Layer:
    """The body of a scan over layers, which keeps for the backward: with "none" every value that it needs, with "dots"
    the results of matrix products (attention scores included), with "full" only the layer's input. The numbers are the
    same.

    A dispatcher with a backward of its own (`grouped`) is one unit: except with "none" its forward runs again.
    """
    require(remat in get_args(Remat), "remat", remat, "one of " + ", ".join(map(repr, get_args(Remat))))
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.dots_saveable if remat == "dots" else jax.checkpoint_policies.nothing_saveable
    # a scan needs no barrier
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)  # type: ignore[return-value]
