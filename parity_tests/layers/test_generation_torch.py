"""`torch_ref.generate` with the rules of `jax_moe.generate` and the literals of `test_generation.py`."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

import torch_ref  # noqa: E402
from parity_tests.layers.test_generation import BAD, KEPT, SHARES, TINY, reference_filter  # noqa: E402
from torch_ref.generation.sampling import filter_logits  # noqa: E402


@pytest.mark.parametrize(("top_k", "top_p", "kept"), KEPT)
def test_filter_by_hand(top_k: int | None, top_p: float | None, kept: list[int]) -> None:
    logits = torch.tensor([SHARES]).log()
    want = torch.full((1, 4), -torch.inf)
    want[0, kept] = logits[0, kept]
    assert torch.equal(filter_logits(logits, top_k, top_p), want)


@pytest.mark.parametrize(("top_k", "top_p"), [(7, None), (None, 0.7), (20, 0.9), (3, 0.5)])
def test_filter_against_the_plain_loop(top_k: int | None, top_p: float | None) -> None:
    logits = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32) * 3
    want = torch.from_numpy(reference_filter(logits, top_k, top_p).astype(np.float32))
    assert torch.equal(filter_logits(torch.from_numpy(logits), top_k, top_p), want)


@pytest.fixture(scope="module")
def model() -> torch_ref.MakeMoE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch_ref.MakeMoE(TINY)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_generator_decides_and_the_mode_stays(model: torch_ref.MakeMoE) -> None:
    prompt = torch.tensor([[1, 2]])
    model.train()
    first, again, other = (
        torch_ref.generate(model, prompt, max_new_tokens=30, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert model.training


def test_greedy_is_argmax_over_the_window(model: torch_ref.MakeMoE) -> None:
    tokens = prompt = torch.tensor([[1, 2], [4, 0]])
    for _ in range(6):
        window = tokens[:, -TINY.block_size :]
        zeros = torch.zeros(TINY.num_layers, *window.shape, TINY.num_experts)
        with torch.no_grad():
            logits = model.eval()(window, randomness=torch_ref.Randomness(noise_BTE=zeros))
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(torch_ref.generate(model, prompt, max_new_tokens=6, temperature=0), tokens)


@pytest.mark.parametrize(("tokens", "settings", "message"), BAD[:-1], ids=[case[2] for case in BAD[:-1]])
def test_errors(model: torch_ref.MakeMoE, tokens: list, settings: dict, message: str) -> None:
    settings = {"max_new_tokens": 3, **settings}
    if "key" in settings:
        settings["generator"] = seeded(settings.pop("key"))
    with pytest.raises(ValueError, match=f"^{message}$"):
        torch_ref.generate(model, torch.tensor(tokens, dtype=torch.long), **settings)


def test_a_plain_router_draws_no_noise() -> None:
    plain = torch_ref.MakeMoE(dataclasses.replace(TINY, noise=False))
    tokens = torch.tensor([[1, 2]])
    first, second = (torch_ref.generate(plain, tokens, max_new_tokens=5, temperature=0) for _ in range(2))
    assert torch.equal(first, second)
