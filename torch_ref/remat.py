"""Rematerialisation: which values of a layer are kept for the backward pass, and which are computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from jax_moe.config import require
from torch_ref.dims import Tensor

Remat = Literal["none", "dots", "full"]
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy that keeps the results of matrix products and computes everything else again."""
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def rematerialised(layer: nn.Module, remat: Remat) -> Callable:
    """The layer. It keeps for the backward pass: with "none" every value that it needs, with "dots" the results of
    matrix products, with "full" only its input. The numbers are the same: random draws are repeated."""
    require(remat in get_args(Remat), "remat", remat, "one of " + ", ".join(map(repr, get_args(Remat))))
    if remat == "none":
        return layer
    # the weights of this call: under `call_in` the module has its stored weights again when the layer is recomputed
    weights: dict[str, Tensor] = dict(layer.named_parameters())

    def answer(*args: Any, **kwargs: Any) -> Any:
        return functional_call(layer, weights, args, kwargs)

    context: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)}
    return partial(checkpoint, answer, use_reentrant=False, **(context if remat == "dots" else {}))
