"""Text from a language model: sampling with a sliding window."""

from torch_ref.generation.generate import generate
from torch_ref.generation.sampling import choose_tokens, filter_logits

__all__ = ["choose_tokens", "filter_logits", "generate"]
