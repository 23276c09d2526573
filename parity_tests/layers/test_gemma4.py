"""Gemma 4's attention and decoder by hand: values that are the keys, a norm of values, proportional rotation, a scale
of each layer, a soft cap. The whole decoder is in parity_tests/table, its mixture in test_pencil.py. No torch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import Decoder, DecoderConfig
from jax_moe.attention import GroupedAttention, rotate, rotations
from jax_moe.attention.positions import whole_call
from jax_moe.config.attention import GroupedAttentionConfig, RopeConfig
from parity_tests.layers.test_decoder import SIZES
from parity_tests.shared.filled import filled

pytestmark = pytest.mark.usefixtures("quick", "small_programs")
BARE = GroupedAttentionConfig(model_dim=1, num_heads=1, num_kv_heads=1, head_dim=2, rope=None)


def test_values_are_the_keys_before_their_norm() -> None:
    """The key map says (3, 4): keys are normed and scaled by (10, 20), values normed alone, over sqrt(12.5)."""
    config = dataclasses.replace(
        BARE, value_from_key=True, value_norm=True, qk_norm="per_head", qk_norm_wide=True, multiplier=1.0
    )
    layer = GroupedAttention(config, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones)
    assert not hasattr(layer, "value") and layer.query_norm.kind == "rms_wide"
    layer.key[...], layer.key_norm.scale[...] = jnp.asarray([[[3.0, 4.0]]]), jnp.asarray([10.0, 20.0])
    positions = whole_call(1, jnp.zeros((1, 1), jnp.int32), None)
    q, k, v = layer.project(jnp.ones((1, 1, 1)), GroupedAttention.shared(config, positions, jnp.float32))
    np.testing.assert_allclose(q[0, 0, 0], [1, 1], rtol=1e-6)
    np.testing.assert_allclose(k[0, 0, 0], [8.48528, 22.62742], rtol=1e-6)
    np.testing.assert_allclose(v[0, 0, 0], [0.848528, 1.131371], rtol=1e-6)
    told = config.words()["attention"]
    assert {"values normed without a scale", "values that are the keys before norm and rotation"} <= set(told)


def test_proportional_rotation() -> None:
    """Of four pairs the first half turn, at the whole head's frequencies 1 and 100^(-1/4), halved; entry i goes with
    i + 4. The other entries pass.
    """
    rope = RopeConfig(kind="proportional", theta=100.0, fraction=0.5, factor=2.0)
    cos, sin = rotations(jnp.asarray([[3]]), rope, 8, jnp.dtype("float32"))
    angles = np.asarray([1.5, 1.5 * 100**-0.25, 0, 0] * 2)
    np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(angles), atol=1e-6)
    x = jnp.arange(1.0, 9.0)[None, None, None]
    turned = rotate(x, cos, sin)[0, 0, 0]
    np.testing.assert_allclose(turned[0], np.cos(1.5) - 5 * np.sin(1.5), rtol=1e-6)
    np.testing.assert_allclose(turned[4], 5 * np.cos(1.5) + np.sin(1.5), rtol=1e-6)
    np.testing.assert_array_equal(turned[np.asarray([2, 3, 6, 7])], [3, 4, 7, 8])
    assert rope.width(8) == 8 and "of the first 0.5 of pairs" in rope.words()
    with pytest.raises(ValueError, match="head_dim=7: must be even"):
        dataclasses.replace(BARE, head_dim=7, rope=rope)


def test_a_soft_cap_and_a_scale_of_layers() -> None:
    """Logits l become 2 tanh(l / 2). With every layer's scale 0 the last norm reads zeros, and all logits are 0; the
    scale is stored and has no gradient.
    """
    plain = DecoderConfig.grouped(**SIZES, layer_scale=True)
    model = filled(lambda: Decoder(plain, rngs=nnx.Rngs(0)))
    capped = filled(lambda: Decoder(dataclasses.replace(plain, logits_softcap=2.0), rngs=nnx.Rngs(0)))
    tokens = jnp.arange(8).reshape(2, 4)
    run = jax.jit(lambda model: model(tokens))
    for one in (model, capped):
        one.blocks.layer_scale[...] = jnp.full((plain.num_layers, 1), 1.0)
    before = np.asarray(run(model))
    np.testing.assert_allclose(run(capped), 2 * np.tanh(before / 2), rtol=0, atol=2e-6)
    model.blocks.layer_scale[...] = jnp.full((plain.num_layers, 1), 0.0)
    assert np.abs(before).max() > 0.1 and not np.asarray(run(model)).any()
    assert "layer_scale" not in {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    with pytest.raises(ValueError, match=r"logits_softcap=0\.0: must be None or a number"):
        dataclasses.replace(plain, logits_softcap=0.0)
