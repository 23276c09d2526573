"""Cached generation: one program reads the prompt, another loops over the new tokens; the host waits only at the end.

A compiled program serves prompts of similar length: prompts are padded on the left, and the cache on the right, to
lengths from `bucket`. The padding does not change the tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.config.checks import require
from jax_moe.dims import Array, Bool, Int, PRNGKeyArray
from jax_moe.dropout import fold
from jax_moe.generation.cache import Cache, decode, prefill
from jax_moe.generation.sampling import choose_tokens
from jax_moe.models.decoder import Decoder

Callback = Callable[[int, np.ndarray], object]


class Sampling(NamedTuple):
    """The settings compiled into the program; temperature and key are its arguments."""

    greedy: bool
    top_k: int | None
    top_p: float | None


class Request(NamedTuple):
    """The values that all steps share."""

    start_B: Int[Array, " B"]  # the slot of each sequence's first token
    prompt_slots: Int[Array, ""]  # the slot of the first new token
    temperature: Array
    key: PRNGKeyArray | None
    stop_tokens: Array  # padded with -1, which is no token
    pad_token: Array


class State(NamedTuple):
    """The values that a step changes."""

    cache: Cache
    new_BN: Int[Array, "B N"]  # N slots for new tokens; pad_token in free slots
    token_B: Int[Array, " B"]  # the latest tokens
    done_B: Bool[Array, " B"]
    num_new: Int[Array, ""]


def bucket(length: int) -> int:
    """The compiled length: `length` rounded up to a multiple of 16 and of a quarter of the power of two below it."""
    step = max(1 << (max(length, 1).bit_length() - 1) >> 2, 16)
    return -(-length // step) * step


def generate_cached(
    model: Decoder, tokens_BT: Any, max_new_tokens: int, temperature: float | int, top_k: int | None,
    top_p: float | int | None, key: PRNGKeyArray | None, mask_BT: Any, stop_tokens: tuple[int, ...],
    pad_token: int | None, callback: Callback | None,
) -> Int[Array, "B new"]:
    """The prompt and the new tokens, as in `generate`; after the last stop `pad_token` fills the rest."""
    tokens, mask = check_prompt(model, tokens_BT, mask_BT)
    moe = model.config.moe
    allowed = "None to generate with a cache (config.moe.with_capacity(None))"
    require(moe.capacity is None, "capacity", moe.capacity, allowed)
    for rope in dict.fromkeys(getattr(layer.attention, "rope", None) for layer in model.config.layers):
        if rope is not None:
            rope.check_growth(int(mask.sum(axis=1).max(initial=0)), max_new_tokens)
    pad_token = pad_token if pad_token is not None else (stop_tokens or (0,))[0]
    prompt_slots, num_slots = bucket(tokens.shape[1]), bucket(bucket(tokens.shape[1]) + max_new_tokens)
    stops = stop_tokens + (-1,) * (bucket(max(len(stop_tokens), 1)) - len(stop_tokens))
    padding = [(0, 0), (prompt_slots - tokens.shape[1], 0)]
    request = Request(
        start_B=jnp.asarray(prompt_slots - mask.sum(axis=1), jnp.int32),
        prompt_slots=jnp.asarray(prompt_slots, jnp.int32),
        temperature=jnp.asarray(temperature, jnp.float32), key=None if temperature == 0 else key,
        stop_tokens=jnp.asarray(stops, jnp.int32), pad_token=jnp.asarray(pad_token, jnp.int32),
    )
    graphdef, weights = nnx.split(model)
    sampling = Sampling(temperature == 0, top_k, top_p)
    first = _start(
        graphdef, weights, jnp.asarray(np.pad(tokens, padding)), request, num_slots=num_slots, sampling=sampling
    )
    proceed = partial(_proceed, graphdef, weights, request, sampling=sampling)
    if callback is None:
        state = proceed(first[0], max_new_tokens)[0]
    else:
        state = _with_callback(first, proceed, max_new_tokens, callback)
    return jnp.concatenate([jnp.asarray(tokens_BT, jnp.int32), state.new_BN[:, :max_new_tokens]], axis=1)


def check_prompt(model: Decoder, tokens_BT: Any, mask_BT: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (0 at padding) and mask, on the host. Raises ValueError for unknown tokens and padding on the right."""
    tokens = np.asarray(tokens_BT)
    mask = np.ones(tokens.shape, bool) if mask_BT is None else np.asarray(mask_BT, bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask_BT has shape {mask.shape}: must be that of tokens_BT, {tokens.shape}")
    tokens = np.where(mask, tokens, 0)
    model.check_tokens(tokens)  # before the cast to int32 wraps large numbers
    tokens = tokens.astype(np.int32)
    for row in range(len(tokens)):
        require(bool(mask[row].any()), "mask_BT", "all False", f"True somewhere: sequence {row} has no token")
        left = bool(mask[row, np.argmax(mask[row]) :].all())
        allowed = f"False on the left alone: sequence {row} has padding after its text"
        require(left, "mask_BT", "False after a token", allowed)
    return tokens, mask


def _with_callback(first: tuple, proceed: Callable, max_new_tokens: int, callback: Callback) -> State:
    """One call of the loop per step; the next step runs while the callback handles the tokens of this step."""
    state, (token_B, all_done) = first
    for step in range(max_new_tokens):
        following = proceed(state, step + 2) if step + 1 < max_new_tokens else (state, None)
        callback(step, np.asarray(token_B))
        state, seen = following
        if bool(all_done) or seen is None:
            break
        token_B, all_done = seen
    return state


@partial(jax.jit, static_argnames=("graphdef", "num_slots", "sampling"))
def _start(
    graphdef: nnx.GraphDef, weights: Any, tokens_BT: Array, request: Request, *, num_slots: int, sampling: Sampling
) -> tuple[State, tuple[Array, Array]]:
    """Reads the prompt and chooses the first new token."""
    logits_BV, cache = prefill(nnx.merge(graphdef, weights), tokens_BT, request.start_B, num_slots)
    batch_size, prompt_slots = tokens_BT.shape
    new_BN = jnp.full((batch_size, num_slots - prompt_slots), request.pad_token, jnp.int32)
    nothing = jnp.zeros((batch_size,), jnp.int32)
    state = State(cache, new_BN, nothing, nothing > 0, jnp.zeros((), jnp.int32))
    return _seen(_append(state, logits_BV, request, sampling))


# One program for any number of new tokens; the donated cache is written in place
@partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames=("state",))
def _proceed(
    graphdef: nnx.GraphDef, weights: Any, request: Request, state: State, until: int | Array, *, sampling: Sampling
) -> tuple[State, tuple[Array, Array]]:
    """Adds tokens until there are `until` of them or all sequences have stopped."""
    model = nnx.merge(graphdef, weights)

    def step(state: State) -> State:
        slot = request.prompt_slots + state.num_new - 1
        logits_BV, cache = decode(model, state.token_B, slot, request.start_B, state.cache)
        return _append(state._replace(cache=cache), logits_BV, request, sampling)

    def goes_on(state: State) -> Array:
        return (state.num_new < until) & ~state.done_B.all()

    return _seen(jax.lax.while_loop(goes_on, step, state))


def _append(state: State, logits_BV: Array, request: Request, sampling: Sampling) -> State:
    step_key = None if sampling.greedy else fold(request.key, state.num_new)
    token_B = choose_tokens(logits_BV, request.temperature, step_key, sampling.top_k, sampling.top_p)
    token_B = jnp.where(state.done_B, request.pad_token, token_B)
    done_B = state.done_B | (token_B[:, None] == request.stop_tokens).any(axis=1)
    new_BN = jax.lax.dynamic_update_slice_in_dim(state.new_BN, token_B[:, None], state.num_new, axis=1)
    return State(state.cache, new_BN, token_B, done_B, state.num_new + 1)


def _seen(state: State) -> tuple[State, tuple[Array, Array]]:
    """The state, plus values the host may read after its buffers are donated."""
    return state, (state.token_B, state.done_B.all())
