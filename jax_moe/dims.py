"""The letters, one glossary for the whole repository, and the array types written with them.

B sequences            T positions            U positions attended to   G routing groups
S tokens in a group    E experts              K choices per token       C slots per expert per group
D model width          F expert width         V vocabulary              L layers
H query heads          J key/value heads      A head width              R rows sorted by expert
N expert clusters      W width of heads' norm  Y shared experts that the router weighs
Q compressed queries   Z compressed keys and values                       M width of a head's values
X entries of a head that do not turn                  P entries that do    (A = X + P)
in attention: G heads that a key/value head serves, C taps of a convolution
I input width of a map O output width of a map  (where they have no letter of their own); I width of a router's state
(G * S >= B * T: the last group may be padded)

A tensor is named role + dims (`weight_GSK`); einsum letters, types and suffixes agree. Lower case is this device's
share. "Axis" is a mesh's, "dim" is a tensor's.
"""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Key, PRNGKeyArray, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Int, Key, PRNGKeyArray, Shaped
    except ImportError:  # shapes are checked under pytest only; without jaxtyping they are plain documentation

        class _Unchecked:
            def __class_getitem__(cls, item: object) -> Any:
                return Any

        Bool = Float = Int = Key = Shaped = _Unchecked
        PRNGKeyArray = Any

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "Key", "PRNGKeyArray", "Shaped", "wide"]


def wide(dtype: DTypeLike) -> jnp.dtype:
    """fp32, or fp64 for fp64: the dtype of scores, weights, sums over choices and losses."""
    return jnp.promote_types(dtype, jnp.float32)
