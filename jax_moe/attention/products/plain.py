"""All scores at once, [B, H, T, U]: the reference for the other ways."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_moe.attention.masks import Scope, hidden
from jax_moe.dims import Array, Bool, Float, PRNGKeyArray, wide
from jax_moe.dropout import dropout


class Softmax(NamedTuple):
    """What is done between the two products."""

    scale: float  # of the scores
    sinks_H: Float[Array, " H"] | None = None  # one more logit for each head, whose share is dropped
    rate: float = 0.0  # of dropout of the weights: only with a key or a mask
    key: PRNGKeyArray | None = None
    keep_BHTU: Bool[Array, "B H T U"] | None = None

    @property
    def drops(self) -> bool:
        """Whether weights are dropped."""
        return self.rate > 0 and (self.key is not None or self.keep_BHTU is not None)


def plain(
    q_BTHA: Float[Array, "B T H A"], k_BUJA: Float[Array, "B U J A"], v_BUJM: Float[Array, "B U J M"], scope: Scope,
    softmax: Softmax,
) -> Float[Array, "B T H M"]:
    """What H query heads find among J key/value heads, each for H / J of them: softmax(q k^T * scale) v.

    Scores are in the input's dtype, their softmax in fp32 or wider.
    """
    dtype, (B, T, H, A), (_, U, J, M) = q_BTHA.dtype, q_BTHA.shape, v_BUJM.shape
    q_BTJGA = q_BTHA.reshape(B, T, J, H // J, A)
    scores_BHTU = jnp.einsum("BTJGA,BUJA->BJGTU", q_BTJGA, k_BUJA).reshape(B, H, T, U) * softmax.scale
    scores_BHTU = hidden(scores_BHTU.astype(wide(dtype)), scope.visible()[:, None])
    weights_BHTU = _weights(scores_BHTU, softmax.sinks_H).astype(dtype)
    weights_BHTU = dropout(weights_BHTU, softmax.rate, softmax.key, softmax.keep_BHTU)
    weights_BJGTU = weights_BHTU.reshape(B, J, H // J, T, U)
    return jnp.einsum("BJGTU,BUJM->BTJGM", weights_BJGTU, v_BUJM).reshape(B, T, H, M)


def _weights(scores_BHTU: Array, sinks_H: Array | None) -> Array:
    """The softmax over the keys and, where there are sinks, one more logit whose share is dropped."""
    if sinks_H is None:
        return jax.nn.softmax(scores_BHTU, axis=-1)
    B, H, T, U = scores_BHTU.shape
    beside_BHT1 = jnp.broadcast_to(sinks_H.astype(scores_BHTU.dtype)[:, None, None], (B, H, T, 1))
    return jax.nn.softmax(jnp.concatenate([scores_BHTU, beside_BHT1], axis=-1), axis=-1)[..., :U]
