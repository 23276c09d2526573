"""Text from a language model: sampling, with a cache or a sliding window."""

from jax_moe.generation.cache import Cache, decode, prefill
from jax_moe.generation.generate import generate
from jax_moe.generation.sampling import choose_tokens, filter_logits
from jax_moe.generation.text import TextStream

__all__ = ["Cache", "TextStream", "choose_tokens", "decode", "filter_logits", "generate", "prefill"]
