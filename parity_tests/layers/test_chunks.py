"""Llama 4's attention by hand: chunks, queries that grow, norms without a scale. The whole decoder is in
parity_tests/table. No torch.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe.attention import GroupedAttention, visible_positions
from jax_moe.attention.positions import Positions, whole_call
from jax_moe.config.attention import GroupedAttentionConfig

pytestmark = pytest.mark.usefixtures("quick", "small_programs")
BARE = GroupedAttentionConfig(model_dim=1, num_heads=1, num_kv_heads=1, head_dim=2, rope=None)


def test_a_chunk_begins_anew() -> None:
    """Equal scores: of five positions in chunks of two, each has the mean of its own chunk so far. With one position of
    padding the chunks begin one later; a step of generation sees what one call sees. Measured: 0.
    """
    config = dataclasses.replace(BARE, chunk=2)
    layer = GroupedAttention(config, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros)
    layer.value[...], layer.out[...] = jnp.ones((1, 1, 2)), jnp.asarray([[[1.0], [0.0]]])
    x_BTD = jnp.asarray([[[1.0], [3.0], [5.0], [9.0], [2.0]]] * 2)
    mask = jnp.asarray([[True] * 5, [False] + [True] * 4])
    positions = whole_call(5, jnp.tile(jnp.arange(5), (2, 1)), mask)
    y_BTD, _ = layer(x_BTD, positions, GroupedAttention.shared(config, positions, x_BTD.dtype))
    np.testing.assert_array_equal(y_BTD[0, :, 0], [1, 2, 5, 7, 2])
    np.testing.assert_array_equal(y_BTD[1, 1:, 0], [3, 4, 9, 5.5])
    whole = visible_positions(jnp.arange(5), 5, None, mask, 2)
    for slot in range(5):
        step = visible_positions(jnp.asarray([slot]), 5, None, mask, 2)
        np.testing.assert_array_equal(step[:, 0], whole[:, slot])


def test_queries_grow_one_step_ahead() -> None:
    """1 + 0.3 ln(1 + floor((position + 1) / 4)), by position in the text and not by slot; 0.3 ln 2 by hand."""
    config = dataclasses.replace(BARE, temperature=0.3, temperature_step=4)
    positions = Positions(jnp.asarray([[0, 2, 3, 11]]), jnp.arange(4), 4, None)
    growth = GroupedAttention.shared(config, positions, jnp.float32).growth_BT
    np.testing.assert_allclose(growth, 1 + 0.3 * np.log([[1, 1, 2, 4]]), rtol=3e-7)
    layer = GroupedAttention(config, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones)
    shared = GroupedAttention.shared(config, positions, jnp.float32)
    q_BTHA, k_BTJA, _ = layer.project(jnp.ones((1, 4, 1)), shared)
    np.testing.assert_allclose(q_BTHA[0, 2, 0], [1.2079442] * 2, rtol=3e-7)
    np.testing.assert_array_equal(k_BTJA, np.ones((1, 4, 1, 2)))


def test_a_norm_without_a_scale() -> None:
    """(3, 4) over its rms, sqrt(12.5); there is no parameter, and values are not normed."""
    config = dataclasses.replace(BARE, qk_norm="per_head", qk_norm_place="after_rope", qk_norm_scale=False)
    layer = GroupedAttention(config, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones)
    assert not hasattr(layer, "query_norm") and not hasattr(layer, "key_norm")
    layer.query[...] = layer.key[...] = layer.value[...] = jnp.asarray([[[3.0, 4.0]]])
    positions = whole_call(1, jnp.zeros((1, 1), jnp.int32), None)
    q, k, v = layer.project(jnp.ones((1, 1, 1)), GroupedAttention.shared(config, positions, jnp.float32))
    np.testing.assert_allclose([q[0, 0, 0], k[0, 0, 0]], [[0.848528, 1.131371]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(v[0, 0, 0], [3, 4])


@pytest.mark.parametrize(("changes", "message"), [
    ({"chunk": 0}, "chunk=0: must be None or an integer of at least 1"),
    ({"chunk": 2, "window": 3}, "chunk=2: must be None beside a window"),
    ({"qk_norm_scale": False}, "qk_norm_scale=False: must be True unless qk_norm='per_head'"),
    ({"temperature": -0.1}, "temperature=-0.1: must be a number of 0"),
    ({"temperature_step": 0}, "temperature_step=0: must be an integer of at least 1"),
])
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(BARE, **changes)
    assert str(caught.value).startswith(message)


def test_words() -> None:
    config = dataclasses.replace(
        BARE, chunk=8, temperature=0.1, qk_norm="per_head", qk_norm_place="after_rope", qk_norm_scale=False
    )
    assert {
        "chunks of 8 positions", "queries growing by 0.1 every 8,192 positions",
        "each head's queries and keys normed after they are turned without a scale",
    } <= set(config.words()["attention"])
