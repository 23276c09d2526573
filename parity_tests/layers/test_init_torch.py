"""Initialisation of `torch_ref`, by the checks of `test_init.py`."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

import torch_ref  # noqa: E402
from parity_tests.layers.test_init import SMALL, check_std, check_uniform  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_the_published_model_has_8_996_545_parameters() -> None:
    with torch.device("meta"):
        model = torch_ref.MakeMoE()
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_996_545


def test_makemoe() -> None:
    for name, parameter in torch_ref.MakeMoE(SMALL).named_parameters():
        value = parameter.detach().numpy()
        if "embedding" in name:
            check_std(value, 1.0, name)
        elif ".ln" in name or name.startswith("ln_f"):
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("weight"):
            check_std(value, (2 / value.shape[1]) ** 0.5, name)
        else:
            fan_in = 256 if name.endswith("net.2.bias") else 64
            assert np.abs(value).max() <= fan_in**-0.5, name


def test_experts_of_a_plain_layer_are_torchs_linear_maps() -> None:
    layer = torch_ref.MoE(torch_ref.presets.mixtral(64, 96, 8, 2))
    for name, parameter in layer.experts.named_parameters():
        check_uniform(parameter.detach().numpy(), parameter.shape[1] ** -0.5, name)


def test_soft_experts_are_orthogonal_with_gain_one_hundredth() -> None:
    layer = torch_ref.SoftMoE(torch_ref.SoftMoEConfig(model_dim=16, num_experts=4, num_slots=32, hidden_dims=(24, 8)))
    check_std(layer.phi.detach().numpy(), 1.0, "phi")
    kernels = [(name, p) for name, p in layer.experts.named_parameters() if "fc" in name]
    assert len(kernels) == 4 * 3 * 2
    for name, parameter in kernels:
        value = parameter.detach().double()
        if name.endswith("bias"):
            assert (value == 0).all()
        else:
            short = value if value.shape[0] <= value.shape[1] else value.T
            assert (short @ short.T - 1e-4 * torch.eye(len(short))).abs().max() < 1e-10, name
