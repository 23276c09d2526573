"""Text from a model: a loop that samples token by token, with makeMoE's sliding window."""

from typing import Any

import torch

from torch_ref.arrays import checked_input
from torch_ref.dims import Int, Tensor, wide
from torch_ref.generation.sampling import check_sampling, choose_tokens
from torch_ref.models.makemoe import MakeMoE, Randomness


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
    """The prompt followed by `max_new_tokens` new tokens; temperature 0 takes the likeliest token, the lower on ties.

    A context longer than block_size is cropped to its last block_size tokens, as in makeMoE. The model runs in
    evaluation mode, and its mode is restored. At temperature 0 nothing is random; else tokens and the router's noise
    are drawn from `generator`. An empty batch gives an empty batch. Raises ValueError for
    settings out of range and for tokens of another kind or shape.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    checked_input("tokens_BT", tokens_BT)
    block_size, was_training = model.config.block_size, model.training
    for start in range(0, max(tokens_BT.shape[1], 1), block_size):
        model.check_tokens(tokens_BT[:, start : start + block_size])
    if not len(tokens_BT):
        return tokens_BT.new_zeros(0, tokens_BT.shape[1] + max_new_tokens)
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(max_new_tokens):
                window_BT = tokens_BT[:, -block_size:]
                randomness = router_noise(model, window_BT, temperature > 0, generator)
                logits_BV = model(window_BT, randomness=randomness)[:, -1]
                new_B1 = choose_tokens(logits_BV, temperature, top_k, top_p, generator)
                tokens_BT = torch.cat([tokens_BT, new_B1.to(tokens_BT.dtype)], dim=1)
    finally:
        model.train(was_training)
    return tokens_BT


def router_noise(
    model: MakeMoE, tokens_BT: Int[Tensor, "B T"], random: bool, generator: torch.Generator | None
) -> Randomness | None:
    """Unit Gaussians for every router, in fp32 or wider, or zeros for no noise; None if the model learns no noise."""
    config = model.config
    if not config.noise:
        return None
    weight = model.lm_head.weight
    like: dict[str, Any] = {"dtype": wide(weight.dtype), "device": weight.device}
    shape = (config.num_layers, *tokens_BT.shape, config.num_experts)
    if not random:
        return Randomness(noise_BTE=torch.zeros(shape, **like))
    return Randomness(noise_BTE=torch.randn(shape, generator=generator, **like))
