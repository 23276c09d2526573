"""Normalised Soft MoE (arXiv 2308.00951, section 2.3): unit-length tokens and slots, times a learned scale."""

from math import log, sqrt
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe.config.describe import describe
from jax_moe.porting.checkpoint import load
from jax_moe.porting.formats.safetensors import write_safetensors
from jax_moe.soft_moe import UNIT_EPS, soft_weights
from parity_tests.porting.porting_cases import soft_state
from parity_tests.shared.compare import MismatchError, check_close
from parity_tests.shared.filled import filled

CONFIG = jax_moe.SoftMoEConfig(model_dim=4, num_experts=2, num_slots=2, normalise=True)
# Tokens of lengths 3 and 5, phi's columns of lengths 2 and 7: only directions count. Cosines 1 and 3/5, scale ln 2 ...
X = [[[3.0, 0.0], [3.0, 4.0]]]
PHI = [[[2.0, 7.0]], [[0.0, 0.0]]]
LOGITS = [[log(2.0), log(2.0)], [0.6 * log(2.0), 0.6 * log(2.0)]]


def check(actual: object, expected: object, tolerance: float) -> None:
    error = check_close({"x": np.asarray(actual)}, {"x": np.asarray(expected)}, tolerance, "weights")
    print(f"measured {error:.1e}")


def test_pencil() -> None:
    """... so that both slots read the tokens in the proportion 2 : 2^0.6, and tokens read both slots alike."""
    dispatch, combine = soft_weights(jnp.asarray(X), jnp.asarray(PHI), None, jnp.asarray(log(2.0)))
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=0)
    check(dispatch[0, :, 0], expected, 1e-6)  # fp32, and the epsilon under the root
    check(combine[0, :, 0], np.full((2, 2), 0.5), 1e-6)
    plain, _ = soft_weights(jnp.asarray(X), jnp.asarray(PHI))
    with pytest.raises(MismatchError):
        check(plain[0, :, 0], expected, 1e-6)


def test_the_length_of_a_token_does_not_matter_and_a_zero_token_has_finite_gradients() -> None:
    layer = filled(lambda: jax_moe.SoftMoE(CONFIG))
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    one, _ = soft_weights(jnp.asarray(x), layer.phi[...], None, layer.scale[...])
    two, _ = soft_weights(jnp.asarray(1000 * x), layer.phi[...], None, layer.scale[...])
    check(one, two, 5e-6)  # the epsilon weighs on the shorter
    x[0, 1] = 0
    graphdef, state = nnx.split(layer)
    grads = jax.grad(lambda s, x: nnx.merge(graphdef, s)(x).sum(), argnums=(0, 1))(state, jnp.asarray(x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert float(grads[0]["scale"][...]) != 0
    assert sqrt(UNIT_EPS) == 1e-3 and layer.scale[...].shape == ()


def test_a_state_dict_with_a_scale_normalises_and_comes_back(tmp_path: Path) -> None:
    state = {**soft_state(), "scale": np.asarray(1.5, np.float32)}
    write_safetensors(tmp_path / "with.safetensors", state)
    write_safetensors(tmp_path / "without.safetensors", soft_state())
    found = load(tmp_path / "with.safetensors")
    assert found.config.normalise
    assert "logits: tokens and phi of unit length, times a learned scale" in describe(found.config)
    back = found.state()
    assert back.keys() == state.keys() and all(np.array_equal(back[name], state[name]) for name in state)
    assert not load(tmp_path / "without.safetensors").config.normalise
