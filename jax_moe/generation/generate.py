"""`generate`: new tokens after a prompt, from any language model of the package."""

from collections.abc import Sequence
from numbers import Integral

import jax.numpy as jnp
import numpy as np

from jax_moe.arrays import check_vocabulary, checked, checked_input
from jax_moe.config.checks import require
from jax_moe.dims import Array, Bool, Int, PRNGKeyArray
from jax_moe.generation.loop import Callback, generate_cached
from jax_moe.generation.sampling import check_sampling
from jax_moe.generation.window import generate_windowed
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.sharding.explicit import auto_inside


@auto_inside("tokens_BT", "tokens_BN")
def generate(
    model: Decoder | MakeMoE,
    tokens_BT: Int[Array, "B T"] | Int[np.ndarray, "B T"],
    *,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    key: PRNGKeyArray | None = None,
    mask_BT: Bool[Array, "B T"] | Bool[np.ndarray, "B T"] | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int | None = None,
    callback: Callback | None = None,
) -> Int[Array, "B new"]:
    """The prompt followed by `max_new_tokens` new tokens. Temperature 0 takes the likeliest token, the lower on ties.

    After a token of `stop_tokens` a sequence is filled with `pad_token` (by default the first stop token); generation
    ends when all sequences have stopped. `callback(step, tokens_B)` gets the tokens of every step, in order, on the
    host; an exception in it ends the generation. `mask_BT` is False at padding, which must be on the left.

    A `Decoder` reads the prompt once and then one token per step, with cached keys and values; only the sampling is
    random. A `MakeMoE` reads the last block_size tokens at every step, with the capacity for that many tokens; with a
    key its router's noise follows the contract. An empty batch gives an empty batch.
    Raises ValueError for settings out of range and for arrays of another kind or shape.
    """
    require(isinstance(model, Decoder | MakeMoE), "model", type(model).__name__, "a Decoder or a MakeMoE")
    check_sampling(max_new_tokens, temperature, top_k, top_p, key is not None)
    model_tokens, sizes = checked_input("tokens_BT", tokens_BT)
    checked(sizes, mask_BT=mask_BT)
    _check_ends(stop_tokens, pad_token, model.config.vocab_size)
    if isinstance(model, Decoder):
        return generate_cached(
            model, tokens_BT, max_new_tokens, temperature, top_k, top_p, key, mask_BT, tuple(stop_tokens), pad_token,
            callback,
        )
    unused = {
        "mask_BT": mask_BT, "stop_tokens": tuple(stop_tokens) or None, "pad_token": pad_token, "callback": callback,
    }
    for name, value in unused.items():
        require(value is None, name, value, "left out for a MakeMoE, which has neither padding nor an end of text")
    check_vocabulary(tokens_BT, model.config.vocab_size)  # before the cast to int32 wraps large numbers
    return generate_windowed(model, model_tokens.astype(jnp.int32), max_new_tokens, temperature, top_k, top_p, key)


def _check_ends(stop_tokens: Sequence[int], pad_token: int | None, vocab_size: int) -> None:
    """Raises ValueError for a stop token or pad token outside the vocabulary."""
    def in_vocabulary(token: object) -> bool:
        return isinstance(token, Integral) and not isinstance(token, bool) and 0 <= int(token) < vocab_size

    tokens = f"0 to {vocab_size - 1} (vocab_size={vocab_size})"
    several = isinstance(stop_tokens, Sequence) and not isinstance(stop_tokens, str)
    require(several, "stop_tokens", stop_tokens, "a tuple of tokens")
    known = all(map(in_vocabulary, stop_tokens))
    require(known, "stop_tokens", stop_tokens, f"tokens of {tokens}; leave out what the model cannot give")
    require(pad_token is None or in_vocabulary(pad_token), "pad_token", pad_token, f"None or a token of {tokens}")
