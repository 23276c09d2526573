"""The question of `test_unchosen_expert.py` in PyTorch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

import torch_ref  # noqa: E402
from jax_moe.config.moe import MoEConfig  # noqa: E402
from parity_tests.layers.test_unchosen_expert import KERNEL, MAKEMOE, MIXTRAL, OLMOE, UNCHOSEN, X  # noqa: E402

CHOSEN = [0, 2, 4]


def layer_of(config: MoEConfig) -> torch_ref.MoE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch_ref.MoE(config).double().eval()
    with torch.no_grad():
        layer.router.linear.weight.copy_(torch.from_numpy(KERNEL.T))
    return layer


def backward(layer: torch_ref.MoE, balance: float = 0.0) -> torch.Tensor:
    """Computes all gradients; returns that of the router's kernel, [E, D]."""
    noise = torch.zeros(2, 8, 5, dtype=torch.float64) if layer.config.router.noise == "learned_gaussian" else None
    y, stats = layer(torch.from_numpy(X), noise_BTE=noise)
    assert (stats.expert_load_E[UNCHOSEN] == 0).all() and (stats.expert_load_E[CHOSEN] > 0).all(), "the case is as told"
    ((y**2).sum() + balance * stats.load_balance_loss).backward()
    return layer.router.linear.weight.grad


@pytest.mark.parametrize("config", [MAKEMOE, OLMOE, MIXTRAL, MIXTRAL.with_capacity(1.5)], ids=range(4))
def test_its_own_gradient_is_exactly_zero(config: MoEConfig) -> None:
    layer = layer_of(config)
    backward(layer)
    for number, expert in enumerate(layer.experts):
        for name, parameter in expert.named_parameters():
            assert parameter.grad is not None, "None would keep AdamW from its decay, unlike jax"
            assert bool((parameter.grad == 0).all()) == (number in UNCHOSEN), name


def test_the_routers_row() -> None:
    over_all = backward(layer_of(OLMOE)).abs().amax(dim=1)
    assert (over_all[UNCHOSEN] > 1e-4).all()
    divided_out = backward(layer_of(MIXTRAL)).abs().amax(dim=1)
    assert (divided_out[UNCHOSEN] < 1e-14 * divided_out.max()).all()
    layer = layer_of(MAKEMOE)
    over_the_chosen = backward(layer)
    assert (over_the_chosen[UNCHOSEN] == 0).all() and (layer.router.linear.bias.grad[UNCHOSEN] == 0).all()  # exactly
    assert (over_the_chosen[CHOSEN] != 0).any(dim=1).all()
    balanced = layer_of(MAKEMOE)
    backward(balanced, balance=0.01)
    assert (balanced.router.linear.bias.grad[UNCHOSEN].abs() > 1e-6).all()
    assert (balanced.experts[UNCHOSEN[0]].up.weight.grad == 0).all()


def test_adamw_moves_it_all_the_same() -> None:
    layer = layer_of(MIXTRAL)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.01)
    before = layer.experts[1].up.weight.detach().numpy().copy()
    backward(layer)
    optimizer.step()
    np.testing.assert_allclose(layer.experts[1].up.weight.detach().numpy(), before * (1 - 0.1 * 0.01), rtol=1e-15)
