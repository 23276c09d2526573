"""The next token from its logits: greedy, or drawn after temperature, top-k and top-p."""

import math
from numbers import Integral

import jax
import jax.numpy as jnp

from jax_moe.config.checks import require
from jax_moe.dims import Array, Float, Int, PRNGKeyArray, wide


def filter_logits(
    logits_BV: Float[Array, "B V"], top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "B V"]:
    """Logits in fp32 or wider, -inf outside the top k tokens and outside the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities, after top_k, sum to top_p; it always holds
    the likeliest token. All tokens tied with the k-th stay.
    """
    logits_BV = logits_BV.astype(wide(logits_BV.dtype))
    if top_k is not None:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p is not None:
        order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
        probs_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
        outside_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV >= top_p
        outside_BV = jnp.take_along_axis(outside_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
        logits_BV = jnp.where(outside_BV, -jnp.inf, logits_BV)
    return logits_BV


def choose_tokens(
    logits_BV: Float[Array, "B V"], temperature: Float[Array, ""], key: PRNGKeyArray | None,
    top_k: int | None = None, top_p: float | None = None,
) -> Int[Array, " B"]:
    """Without a key the likeliest token, the lower on ties; with a key a draw from the filtered logits / temperature.

    The draw is in fp32 or wider for logits of any dtype: in bf16 its noise has 128 values, and ties favour low tokens.
    """
    if key is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV.astype(wide(logits_BV.dtype))
    # the maximum becomes 0, so that dividing by a small temperature gives no infinity
    logits_BV -= logits_BV.max(axis=-1, keepdims=True)
    temperature = jnp.maximum(temperature.astype(logits_BV.dtype), jnp.finfo(logits_BV.dtype).tiny)
    logits_BV = filter_logits(logits_BV / temperature, top_k, top_p)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def check_sampling(
    max_new_tokens: int, temperature: float | int, top_k: int | None, top_p: float | int | None, has_key: bool
) -> None:
    """Raises ValueError for sampling settings out of range."""
    enough = isinstance(max_new_tokens, Integral) and max_new_tokens >= 1
    require(enough, "max_new_tokens", max_new_tokens, "at least 1")
    require(temperature >= 0, "temperature", temperature, "0 (greedy) or above")
    require(temperature < math.inf, "temperature", temperature, "finite")
    require(top_k is None or (isinstance(top_k, Integral) and top_k >= 1), "top_k", top_k, "None or at least 1")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "None or above 0 and at most 1")
    require(temperature == 0 or has_key, "temperature", temperature, "0 without a key: sampling needs key=")
