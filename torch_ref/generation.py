"""Text from a model: sampling with makeMoE's sliding window, one token after the other."""

import torch

from torch_ref.block import Randomness
from torch_ref.config import require
from torch_ref.dims import Float, Int, Tensor
from torch_ref.models.makemoe import MakeMoE


def filter_logits(
    logits_BV: Float[Tensor, "B V"], top_k: int | None = None, top_p: float | int | None = None
) -> Float[Tensor, "B V"]:
    """Logits with -inf outside the top-k and the nucleus: the fewest best tokens whose probabilities reach top_p.

    Ties at the k-th place all stay. The nucleus is taken after the top-k and always keeps the best token.
    """
    filtered = []
    for logits_V in logits_BV:
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


def check_sampling(max_new_tokens: int, temperature: float | int, top_k: int | None, top_p: float | int | None) -> None:
    """Raises ValueError for settings that cannot be sampled with."""
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(temperature >= 0, "temperature", temperature, "0 (greedy) or above")
    require(top_k is None or top_k >= 1, "top_k", top_k, "None or at least 1")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "None or above 0 and at most 1")


def generate(
    model: MakeMoE,
    tokens_BT: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B new"]:
    """The prompt followed by `max_new_tokens` new tokens; temperature 0 takes the best one (lower index on ties).

    A context longer than block_size is cropped to its last block_size tokens, as makeMoE does. Runs the model in
    evaluation mode and puts its mode back. Greedy, nothing is random; else tokens and the router's noise are drawn
    from `generator`. Raises ValueError for settings out of range.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    block_size, was_training = model.config.block_size, model.training
    for start in range(0, max(tokens_BT.shape[1], 1), block_size):
        model.check_tokens(tokens_BT[:, start : start + block_size])
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(max_new_tokens):
                window_BT = tokens_BT[:, -block_size:]
                randomness = router_noise(model, window_BT, temperature > 0, generator)
                logits_BV = model(window_BT, randomness=randomness)[:, -1]
                new_B1 = next_token(logits_BV, temperature, top_k, top_p, generator)
                tokens_BT = torch.cat([tokens_BT, new_B1.to(tokens_BT.dtype)], dim=1)
    finally:
        model.train(was_training)
    return tokens_BT


def router_noise(
    model: MakeMoE, tokens_BT: Int[Tensor, "B T"], random: bool, generator: torch.Generator | None
) -> Randomness | None:
    """Unit Gaussians for every router, or zeros that silence it; None for a model without learned noise."""
    config = model.config
    if not config.noise:
        return None
    like = model.lm_head.weight
    shape = (config.num_layers, *tokens_BT.shape, config.num_experts)
    if not random:
        return Randomness(noise_BTE=torch.zeros(shape, dtype=like.dtype, device=like.device))
    return Randomness(noise_BTE=torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator))


def next_token(
    logits_BV: Float[Tensor, "B V"], temperature: float | int, top_k: int | None, top_p: float | int | None,
    generator: torch.Generator | None,
) -> Int[Tensor, "B 1"]:
    """The best token, or one drawn from the filtered softmax."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = filter_logits(logits_BV / temperature, top_k, top_p)
    return torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1, generator=generator)
