"""The letters of `jax_moe/dims.py` over torch tensors.

B sequences            T positions            U positions attended to   G routing groups
S tokens in a group    E experts              K choices per token       C slots per expert per group
D model width          F expert width         V vocabulary              L layers
H query heads          J key/value heads      A head width              R rows of one expert
N expert clusters      W width of heads' norm  Y shared experts that the router weighs
Q compressed queries   Z compressed keys and values                       M width of a head's values
X entries of a head that do not turn                  P entries that do    (A = X + P)
in attention: G heads that a key/value head serves, C taps of a convolution
I input width of a map O output width of a map  (where they have no letter of their own); I width of a router's state
(G * S >= B * T: the last group may be padded)

A tensor is named role + dims (`weight_GSK`); types and suffixes agree.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Int, Shaped
    except ImportError:  # shapes are checked under pytest only; without jaxtyping they are plain documentation

        class _Unchecked:
            def __class_getitem__(cls, item: object) -> Any:
                return Any

        Bool = Float = Int = Shaped = _Unchecked

__all__ = ["Bool", "Float", "Int", "Shaped", "Tensor", "wide"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: the dtype of scores, weights, sums over choices and losses."""
    return torch.promote_types(dtype, torch.float32)
