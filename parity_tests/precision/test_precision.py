"""What stays fp32 with bf16 inputs, in both frameworks: the router's answer, the sums over choices, the losses."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from parity_tests.shared.filled import filled

CONFIG = presets.mixtral(model_dim=8, expert_dim=12, num_experts=4, top_k=2)
X = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)


def test_jax_keeps_scores_weights_and_losses_wide() -> None:
    layer = filled(lambda: jax_moe.MoE(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    x_BTD = jnp.asarray(X, jnp.bfloat16)
    _, _, routing, slots, *_ = layer.run(x_BTD)
    y_BTD, stats = layer(x_BTD)
    assert y_BTD.dtype == jnp.bfloat16
    assert routing.logits_GSE.dtype == routing.weight_GSK.dtype == slots.weight_GSK.dtype == jnp.float32
    assert {value.dtype for value in stats} == {jnp.dtype("float32")}
    # two bf16 weights would miss 1 by up to 2^-8
    assert float(jnp.abs(routing.weight_GSK.sum(axis=-1) - 1).max()) < 2e-7


def test_torch_keeps_scores_weights_and_losses_wide() -> None:
    torch_ref = pytest.importorskip("torch_ref", reason="the other half of this is PyTorch's: install the extra `test`")
    import torch

    layer = torch_ref.MoE(CONFIG).bfloat16().eval()
    x_BTD = torch.from_numpy(X).bfloat16()
    _, _, routing, slots, *_ = layer.run(x_BTD)
    y_BTD, stats = layer(x_BTD)
    assert y_BTD.dtype == torch.bfloat16
    assert routing.logits_GSE.dtype == routing.weight_GSK.dtype == slots.weight_GSK.dtype == torch.float32
    assert {value.dtype for value in stats} == {torch.float32}
    assert float((routing.weight_GSK.detach().sum(dim=-1) - 1).abs().max()) < 2e-7
