"""As in JAX, padding may hold NaN in the PyTorch layers."""

import dataclasses

import numpy as np
import pytest

from parity_tests.layers.test_poisoned import DROPLESS, LAYERS, MASK
from parity_tests.shared.compare import check_exact

torch = pytest.importorskip("torch", reason="compares with PyTorch")


@pytest.mark.parametrize("name", ["grouped", "gather, capacity", "soft"])
def test_padding_may_hold_nan(name: str) -> None:
    import torch_ref

    def answers(padding: float) -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        config = LAYERS[name]
        layer = torch_ref.SoftMoE(config) if name == "soft" else torch_ref.MoE(config)
        x = np.random.default_rng(0).normal(size=(1, 10, 8)).astype(np.float32)
        x[~MASK] = padding
        x_BTD = torch.tensor(x, requires_grad=True)
        y, stats = layer(x_BTD, mask_BT=torch.tensor(MASK))
        ((y * torch.tensor(MASK)[..., None]) ** 2).sum().add(stats.load_balance_loss + stats.router_z_loss).backward()
        gradients = {key: value.grad for key, value in layer.named_parameters()}
        return {key: a.detach().numpy() for key, a in (gradients | {"y": y, "x": x_BTD.grad}).items()}

    check_exact(answers(np.nan), answers(0), name)


def test_shared_experts_with_biases_say_nothing_at_padding() -> None:
    import torch_ref

    expert = dataclasses.replace(DROPLESS.expert, shared_dim=6, bias=True)
    layer = torch_ref.MoE(dataclasses.replace(DROPLESS, expert=expert))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    y = layer(torch.ones(1, 10, 8), mask_BT=torch.tensor(MASK))[0].detach().numpy()
    assert (y[~MASK] == 0).all() and (y[MASK] != 0).all()
