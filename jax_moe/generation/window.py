"""makeMoE's generation: every step reads the whole window again, inside one jitted loop."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.dims import Array, Int, PRNGKeyArray
from jax_moe.dropout import fold
from jax_moe.generation.sampling import choose_tokens
from jax_moe.models.makemoe import MakeMoE


def generate_windowed(
    model: MakeMoE, tokens_BT: Int[Array, "B T"], max_new_tokens: int, temperature: float | int, top_k: int | None,
    top_p: float | int | None, key: PRNGKeyArray | None,
) -> Int[Array, "B new"]:
    """The prompt and the new tokens. The context is the last block_size tokens; its true length sets the capacity.

    Nothing can be cached: learned positions slide with the window, and its tokens compete for capacity.
    """
    config = model.config
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
        chosen_B = choose_tokens(logits_BV, temperature, None if greedy else fold(step_key, 1), top_k, top_p)
        return jax.lax.dynamic_update_slice_in_dim(tokens, chosen_B[:, None].astype(tokens.dtype), end, axis=1)

    return jax.lax.fori_loop(0, max_new_tokens, step, padded)[:, :total]
