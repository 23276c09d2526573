"""Text from a model: sampling, and makeMoE's sliding window inside one jitted loop."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.config import require
from jax_moe.dims import Array, Float, Int, PRNGKeyArray
from jax_moe.dropout import fold
from jax_moe.models.makemoe import MakeMoE


def filter_logits(
    logits_BV: Float[Array, "B V"], top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "B V"]:
    """Logits with -inf outside the top-k and the nucleus: the fewest best tokens whose probabilities reach top_p.

    Ties at the k-th place all stay. The nucleus is taken after the top-k and always keeps the best token.
    """
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


def check_sampling(
    max_new_tokens: int, temperature: float | int, top_k: int | None, top_p: float | int | None, has_key: bool
) -> None:
    """Raises ValueError for settings that cannot be sampled with."""
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(temperature >= 0, "temperature", temperature, "0 (greedy) or above")
    require(top_k is None or top_k >= 1, "top_k", top_k, "None or at least 1")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "None or above 0 and at most 1")
    require(temperature == 0 or has_key, "temperature", temperature, "0 without a key: sampling needs key=")


def generate(
    model: MakeMoE,
    tokens_BT: Int[Array, "B T"] | Int[np.ndarray, "B T"],
    *,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    key: PRNGKeyArray | None = None,
) -> Int[Array, "B new"]:
    """The prompt followed by `max_new_tokens` new tokens; temperature 0 takes the best one (lower index on ties).

    A context longer than block_size is cropped to its last block_size tokens, as makeMoE does. The capacity is that of
    the window's real length, so short prompts drop what the original drops. Without a key (greedy only) nothing is
    random; with one the router's noise follows the contract too. Raises ValueError for settings out of range.
    """
    require(isinstance(model, MakeMoE), "model", type(model).__name__, "a MakeMoE; other models cannot generate yet")
    check_sampling(max_new_tokens, temperature, top_k, top_p, key is not None)
    config = model.config
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    for start in range(0, max(tokens_BT.shape[1], 1), config.block_size):
        model.check_tokens(tokens_BT[:, start : start + config.block_size])
    batch_size, moe = tokens_BT.shape[0], config.moe
    limits = [moe.expert_capacity(max(batch_size * n, 1)) for n in range(config.block_size + 1)]
    graphdef, weights = nnx.split(model)
    return _generate(
        graphdef, weights, tokens_BT, jnp.asarray(limits, jnp.int32), jnp.asarray(temperature, jnp.float32), key,
        max_new_tokens=max_new_tokens, greedy=temperature == 0, top_k=top_k, top_p=top_p,
    )


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "greedy", "top_k", "top_p"))
def _generate(
    graphdef: nnx.GraphDef, weights: Any, tokens_BT: Array, limit_of_length: Array, temperature: Array,
    key: PRNGKeyArray | None, *, max_new_tokens: int, greedy: bool, top_k: int | None, top_p: float | None,
) -> Array:
    model = nnx.merge(graphdef, weights)
    block_size, prompt_length = model.config.block_size, tokens_BT.shape[1]
    total = prompt_length + max_new_tokens
    padded = jnp.pad(tokens_BT, [(0, 0), (0, max(total, block_size) - prompt_length)])

    def step(i: Array, tokens: Array) -> Array:
        end = prompt_length + i
        length = jnp.minimum(end, block_size)
        window = jax.lax.dynamic_slice_in_dim(tokens, end - length, block_size, axis=1)
        step_key = fold(key, i)
        logits_BTV = model(
            window, key=step_key, training=False, capacity_limit=limit_of_length[length],
            mask_BT=jnp.broadcast_to(jnp.arange(block_size) < length, window.shape),
        )
        logits_BV = jax.lax.dynamic_index_in_dim(logits_BTV, length - 1, axis=1, keepdims=False)
        if step_key is None or greedy:
            chosen_B = jnp.argmax(logits_BV, axis=-1)
        else:
            logits_BV = filter_logits(logits_BV / temperature.astype(logits_BV.dtype), top_k, top_p)
            chosen_B = jax.random.categorical(jax.random.fold_in(step_key, 1), logits_BV)
        return jax.lax.dynamic_update_slice_in_dim(tokens, chosen_B[:, None].astype(tokens.dtype), end, axis=1)

    return jax.lax.fori_loop(0, max_new_tokens, step, padded)[:, :total]
