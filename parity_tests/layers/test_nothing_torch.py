"""`torch_ref` answers no sequences and no positions as `jax_moe` does."""

import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

import torch_ref  # noqa: E402
from jax_moe import MoE  # noqa: E402
from parity_tests.layers.test_nothing import LAYERS, SHAPES, TINY  # noqa: E402
from torch_ref import losses  # noqa: E402


@pytest.mark.parametrize("name", LAYERS)
def test_layers_answer_with_nothing(name: str) -> None:
    kind, config = LAYERS[name]
    layer = getattr(torch_ref, kind.__name__)(config)
    for B, T in SHAPES:
        answer = layer(torch.zeros(B, T, 8))
        y_BTD, stats = answer if isinstance(answer, tuple) else (answer, None)
        assert y_BTD.shape == (B, T, 8)
        assert not any(value.any() or value.isnan().any() for value in stats or ())
        if kind is MoE:
            y_BTD.sum().backward()


def test_models_and_generate() -> None:
    model = torch_ref.MakeMoE(TINY)
    none, no_position = torch.zeros(0, 3, dtype=torch.int32), torch.zeros(2, 0, dtype=torch.int32)
    assert model(none).shape == (0, 3, 5)
    assert torch_ref.generate(model, none, max_new_tokens=3).shape == (0, 6)
    for call in (lambda: model(no_position), lambda: torch_ref.generate(model, no_position, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"^tokens_BT has 0 positions: must be 1 to block_size=4$"):
            call()


def test_losses_of_nothing_are_zero() -> None:
    logits_GSE, expert_GSK = torch.zeros(0, 3, 4), torch.zeros(0, 3, 2, dtype=torch.long)
    for value in (
        losses.masked_mean(logits_GSE, None), losses.router_z_loss(logits_GSE), losses.router_entropy(logits_GSE),
        losses.expert_load(expert_GSK, 4, torch.float32), losses.importance(expert_GSK, torch.zeros(0, 3, 2), 4),
        losses.smooth_load(logits_GSE, logits_GSE, logits_GSE + 1, 2),
    ):
        assert not value.any() and not value.isnan().any()
