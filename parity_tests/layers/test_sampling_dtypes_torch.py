"""`torch_ref` draws tokens as often as it should, whatever dtype their logits have."""

import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

import torch_ref  # noqa: E402
from parity_tests.layers.test_sampling_dtypes import CASES, NUM_DRAWS  # noqa: E402
from parity_tests.shared.frequencies import DTYPES, MOST, shares, surprise, zipf  # noqa: E402
from torch_ref.generation.sampling import choose_tokens, filter_logits  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case: str, dtype: str) -> None:
    logits, settings = CASES[case]
    if dtype == "float64" and len(logits) > 1000:
        pytest.skip("its draws take long, and the shorter distributions say the same")
    logits_V = torch.tensor(logits).to(getattr(torch, dtype))
    generator, rows = torch.Generator().manual_seed(0), logits_V.expand(100, -1)
    temperature, top_k, top_p = settings.get("temperature", 1.0), settings.get("top_k"), settings.get("top_p")
    tokens = torch.cat([choose_tokens(rows, temperature, top_k, top_p, generator) for _ in range(NUM_DRAWS // 100)])
    measured = surprise(tokens.numpy(), shares(logits_V.double().numpy(), **settings))
    assert measured < MOST, f"{measured:.1f} standard deviations"


def test_a_cut_in_the_logits_own_dtype_is_caught() -> None:
    """In bf16 the sum of 1000 equal shares stands still long before it is 1."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    probs = logits.softmax(dim=-1)
    assert int((probs.cumsum(dim=-1) - probs < 0.9).sum()) != 900
    assert int(filter_logits(logits, top_p=0.9).isfinite().sum()) in (900, 901)


def test_filtered_logits_are_wide_and_the_lower_token_wins_a_tie() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]], dtype=torch.bfloat16)
    assert filter_logits(logits, top_k=2).dtype == torch.float32
    assert choose_tokens(logits, 0, None, None, None).tolist() == [[1]]
    for temperature in (1e-3, 1e-38, 1e-42):
        assert int(choose_tokens(logits + torch.tensor([0, 0, 1, 0]), temperature, None, None, None)) == 2


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_generate_draws_so_too_and_its_noise_is_wide(dtype: str) -> None:
    config = torch_ref.MakeMoEConfig(
        vocab_size=1000, block_size=2, model_dim=4, num_heads=2, num_layers=1, num_experts=2, top_k=1,
        capacity_factor=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch_ref.MakeMoE(config).to(getattr(torch, dtype))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.tensor(zipf(1000)))
    seen = []
    see = lambda _, args, kwargs: seen.append(kwargs["noise_BTE"].dtype)  # noqa: E731
    model.blocks[0].smoe.register_forward_pre_hook(see, with_kwargs=True)
    prompt = torch.zeros(250, 1, dtype=torch.long)
    drawn = torch_ref.generate(model, prompt, max_new_tokens=16, generator=torch.Generator().manual_seed(0))[:, 1:]
    assert surprise(drawn.numpy(), shares(model.lm_head.bias.detach().double().numpy())) < MOST
    assert set(seen) == {torch.float32}
