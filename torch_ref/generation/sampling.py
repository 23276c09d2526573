"""The next token from its logits: greedy, or drawn after temperature, top-k and top-p."""

import math
from numbers import Integral

import torch

from jax_moe.config import require
from torch_ref.dims import Float, Int, Tensor, wide
from torch_ref.top_k import best_first


def filter_logits(
    logits_BV: Float[Tensor, "B V"], top_k: int | None = None, top_p: float | int | None = None
) -> Float[Tensor, "B V"]:
    """Logits in fp32 or wider, -inf outside the top k tokens and outside the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities, after top_k, sum to top_p; it always holds
    the likeliest token. All tokens tied with the k-th stay.
    """
    filtered = []
    for logits_V in logits_BV.to(wide(logits_BV.dtype)):
        if top_k is not None:
            kth = logits_V.sort(descending=True).values[:top_k][-1]
            logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
        if top_p is not None:
            probs_V, order_V = logits_V.softmax(dim=-1).sort(descending=True, stable=True)
            count = int((probs_V.cumsum(dim=-1) - probs_V < top_p).sum())
            outside_V = torch.ones_like(logits_V, dtype=torch.bool)
            outside_V[order_V[:count]] = False
            logits_V = logits_V.masked_fill(outside_V, -torch.inf)
        filtered.append(logits_V)
    return torch.stack(filtered)


def choose_tokens(
    logits_BV: Float[Tensor, "B V"], temperature: float | int, top_k: int | None, top_p: float | int | None,
    generator: torch.Generator | None,
) -> Int[Tensor, "B 1"]:
    """At temperature 0 the likeliest token, the lower on ties; else a draw from the filtered logits / temperature."""
    if temperature == 0:
        return best_first(logits_BV, 1)
    logits_BV = logits_BV.to(wide(logits_BV.dtype))
    # the maximum becomes 0, so that dividing by a small temperature gives no infinity
    logits_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    logits_BV = filter_logits(logits_BV / max(temperature, torch.finfo(logits_BV.dtype).tiny), top_k, top_p)
    return torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1, generator=generator)


def check_sampling(max_new_tokens: int, temperature: float | int, top_k: int | None, top_p: float | int | None) -> None:
    """Raises ValueError for settings out of range."""
    enough = isinstance(max_new_tokens, Integral) and max_new_tokens >= 1
    require(enough, "max_new_tokens", max_new_tokens, "at least 1")
    require(temperature >= 0, "temperature", temperature, "0 (greedy) or above")
    require(temperature < math.inf, "temperature", temperature, "finite")
    require(top_k is None or (isinstance(top_k, Integral) and top_k >= 1), "top_k", top_k, "None or at least 1")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "None or above 0 and at most 1")
