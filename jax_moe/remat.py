"""Rematerialisation: what of a layer is kept for the backward pass, and what is computed a second time."""

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import jax

from jax_moe.config.checks import require

Remat = Literal["none", "dots", "full"]
Layer = TypeVar("Layer", bound=Callable)


def rematerialised(layer: Layer, remat: Remat) -> Layer:
    """The body of a scan over layers. "none" keeps all that the backward needs, "dots" the answers of matrix products
    (attention's scores among them), "full" the layer's input alone. The numbers are the same.

    A dispatcher with a backward of its own (`grouped`) is a whole: except under "none" its forward runs again.
    """
    require(remat in get_args(Remat), "remat", remat, "one of " + ", ".join(map(repr, get_args(Remat))))
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.dots_saveable if remat == "dots" else jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)  # type: ignore[return-value]  # a scan needs no barrier
