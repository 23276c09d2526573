"""gpt-oss's attention sinks and its norm, Qwen3-Next's gate and its norm, by hand. No torch.

The whole decoders are in parity_tests/table.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe.attention import GroupedAttention
from jax_moe.attention.grouped import Shared
from jax_moe.attention.positions import whole_call
from jax_moe.config.attention import GroupedAttentionConfig
from jax_moe.norms import make_norm, rms_norm

pytestmark = pytest.mark.usefixtures("quick", "small_programs")


def test_a_sink_takes_its_share() -> None:
    """Scores of 0 and sinks ln 2 and ln 4: of t keys each has 1 / (t + 2) in the first head, 1 / (t + 4) in the
    second. Measured: 6e-8.
    """
    config = GroupedAttentionConfig(model_dim=1, num_heads=2, num_kv_heads=1, head_dim=2, rope=None, sinks=True)
    layer = GroupedAttention(config, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros)
    layer.value[...], layer.out[...] = jnp.ones((1, 1, 2)), jnp.asarray([[[1.0], [0.0]], [[0.0], [10.0]]])
    layer.sinks[...] = jnp.log(jnp.asarray([2.0, 4.0]))
    x_BTD = jnp.asarray([[[1.0], [3.0], [8.0]]])
    y_BTD, _ = layer(x_BTD, whole_call(3, jnp.arange(3)[None], None), Shared(None))
    expected = [[1 / 3 + 10 / 5], [4 / 4 + 40 / 6], [12 / 5 + 120 / 7]]
    np.testing.assert_allclose(y_BTD, [expected], rtol=6e-7)


def test_the_norm_is_rounded_after_its_scale() -> None:
    """(3, 4) over its rms, sqrt(12.5): (0.848528, 1.131371), times 3 is (2.545584, 3.394113); bf16 has 1/64 there.

    Rounded before the scale the second is 1.1328125 * 3 = 3.3984375, halfway, and so 3.40625.
    """
    x_D, scale_D = jnp.asarray([3.0, 4.0], jnp.bfloat16), jnp.asarray([3.0, 3.0])
    assert rms_norm(x_D, scale_D, 1e-12).tolist() == [163 / 64, 218 / 64]
    norm = make_norm("rms_wide", 2, 1e-12, jnp.float32, nnx.Rngs(0))
    norm.scale[...] = scale_D
    assert norm(x_D).dtype == jnp.bfloat16 and norm(x_D).tolist() == [163 / 64, 217 / 64]


def test_a_gate_on_what_each_head_found() -> None:
    """One token finds its own value, 6, in both heads; the gates are sigmoid(ln 2) = 2/3 and sigmoid(-ln 5) = 1/6.

    Measured: 8e-8.
    """
    config = GroupedAttentionConfig(model_dim=1, num_heads=2, num_kv_heads=1, head_dim=2, rope=None, output_gate=True)
    layer = GroupedAttention(config, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros)
    layer.value[...], layer.out[...] = jnp.full((1, 1, 2), 3.0), jnp.asarray([[[1.0], [0.0]], [[0.0], [10.0]]])
    layer.gate[...] = jnp.log(jnp.asarray([[[2.0, 1.0], [1.0, 1 / 5]]])) / 2
    y_BTD, _ = layer(jnp.asarray([[[2.0]]]), whole_call(1, jnp.zeros((1, 1), jnp.int32), None), Shared(None))
    np.testing.assert_allclose(y_BTD, [[[6 * 2 / 3 + 10 * 6 / 6]]], rtol=8e-7)


def test_the_stored_scale_is_less_1() -> None:
    """As above, and with 2 stored for 3."""
    norm = make_norm("rms_centered", 2, 1e-12, jnp.float32, nnx.Rngs(0))
    assert norm.scale[...].tolist() == [0, 0]
    norm.scale[...] = jnp.asarray([2.0, 2.0])
    assert norm(jnp.asarray([3.0, 4.0], jnp.bfloat16)).tolist() == [163 / 64, 217 / 64]


def test_words() -> None:
    config = GroupedAttentionConfig(model_dim=4, num_heads=2, num_kv_heads=1, head_dim=2, sinks=True)
    assert "a learned logit per head in the softmax's denominator" in config.words()["attention"]
