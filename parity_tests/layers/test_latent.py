"""Latent attention without transformers: the absorbed form, its cache, one head by hand, its settings. No torch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import Decoder, DecoderConfig, presets
from jax_moe.attention.latent import LatentAttention
from jax_moe.attention.positions import Positions, whole_call
from jax_moe.config.attention import RopeConfig
from jax_moe.config.decoder import LayerConfig
from jax_moe.config.latent import LatentAttentionConfig
from jax_moe.generation.cache import cache_bytes
from parity_tests.layers.test_decoder_generation import cached_logits, whole_logits
from parity_tests.shared.compare import MismatchError, check_close
from parity_tests.shared.filled import filled

pytestmark = pytest.mark.usefixtures("quick", "small_programs")
LATENT = LatentAttentionConfig(
    model_dim=12, num_heads=3, plain_dim=4, rope_dim=2, value_dim=5, rank=6, query_rank=7, bias=True, temperature=0.3,
    rope=RopeConfig(original_max_positions=4, pairs="neighbours"),
)
FP64 = 1e-14  # measured 1.3e-15


def decoder(dtype: str = "float32", **changes: Any) -> Decoder:
    """Three layers; the first without a mixture."""
    moe = presets.deepseek_v3(12, 6, 4, 2, num_clusters=1, top_clusters=1, shared_dim=6)
    base = DecoderConfig.grouped(
        vocab_size=19, model_dim=12, num_layers=3, num_heads=1, num_kv_heads=1, head_dim=4, moe=moe, dense_layers=(0,),
        dense_dim=5,
    )
    attention = dataclasses.replace(LATENT, **changes)
    layers = tuple(LayerConfig(attention=attention, ffn=layer.ffn) for layer in base.layers)
    config = dataclasses.replace(base, layers=layers)
    return filled(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=dtype))


@pytest.mark.parametrize("changes", [{}, {"query_rank": None, "bias": False, "temperature": 0.0, "rope": None}])
def test_absorbed_steps_are_those_of_one_call(changes: dict[str, Any]) -> None:
    """Every step against the compressed cache, in fp64; a slot too far (the planted fault) is caught."""
    with jax.enable_x64(True):
        model = decoder("float64", **changes)
        expected = {"logits": whole_logits(model)}
        check_close({"logits": cached_logits(model)}, expected, FP64, "absorbed")
        if not changes:
            with pytest.raises(MismatchError):
                check_close({"logits": cached_logits(model, off=1)}, expected, 1e-3, "a slot too far")


def test_the_cache_holds_the_compressed_form() -> None:
    """rank + rope_dim numbers a token and layer, whatever the number of heads."""
    assert cache_bytes(decoder().config, 2, 10, "float32") == 3 * 2 * 10 * (6 + 2) * 4 + 2 * 10


def test_by_hand() -> None:
    """Token 1 looks at tokens 0 and 1, one head, in numpy (DeepSeek-V2, eq. 9 to 19)."""
    config = LatentAttentionConfig(
        model_dim=2, num_heads=1, plain_dim=1, rope_dim=2, value_dim=1, rank=1, norm_eps=1e-9,
        rope=RopeConfig(kind="linear", factor=2.0, mscale_all_dim=1.0),
    )
    with jax.enable_x64(True):
        layer = LatentAttention(
            config, rngs=nnx.Rngs(0), kernel_init=jax.nn.initializers.ones, param_dtype=jnp.float64
        )
        layer.query[...] = jnp.asarray([[[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.5]]])
        layer.down[...] = jnp.asarray([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        layer.up[...] = jnp.asarray([[[3.0, -4.0]]])
        layer.out[...] = jnp.asarray([[[1.0, 2.0]]])
        x = jnp.asarray([[[1.0, 2.0], [-3.0, 1.0]]])
        positions = whole_call(2, jnp.arange(2)[None], None)
        y, _ = layer(x, positions, LatentAttention.shared(config, positions, x.dtype))
    compressed = np.asarray([2.0, -6.0])
    latent = compressed / np.sqrt(compressed**2 + 1e-9)  # of one entry the norm leaves little but the sign
    keys, values = 3 * latent, -4 * latent
    angle = 1.0 / 2  # position 1, divided by factor
    turn = lambda a, b, t: np.asarray([a * np.cos(t) - b * np.sin(t), b * np.cos(t) + a * np.sin(t)])  # noqa: E731
    query, turned = -3.0, turn(-1.5, 0.5, angle)
    scale = 3**-0.5 * (0.1 * np.log(2.0) + 1) ** 2
    rotary = np.asarray([turned @ turn(1.0, 2.0, 0.0), turned @ turn(-3.0, 1.0, angle)])
    scores = (query * keys + rotary) * scale
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    expected = {"y": np.outer([1.0], weights @ values * np.asarray([1.0, 2.0]))}
    check_close({"y": np.asarray(y)[:, 1]}, expected, 1e-15, "by hand")  # measured 1.1e-16


@pytest.mark.parametrize(("changes", "message"), [
    ({"rank": 0}, "rank=0: must be an integer of at least 1"),
    ({"query_rank": -1}, "query_rank=-1: must be an integer of at least 1"),
    ({"rope_dim": 3}, "rope_dim=3: must be even"),
    ({"temperature": 0.1, "rope": RopeConfig()}, "temperature=0.1: must be 0 without original_max_positions"),
    ({"rope": RopeConfig(fraction=0.5)}, "rope.fraction=0.5: must be 1"),
])
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(LATENT, **changes)
    assert str(caught.value).startswith(message)


def test_queries_grow_with_their_position() -> None:
    """1 + 0.3 ln(1 + floor(position / 4)), by position in the text and not by slot."""
    positions = Positions(jnp.asarray([[0, 3, 4, 9]]), jnp.arange(4), 4, None)
    growth = LatentAttention.shared(LATENT, positions, jnp.float32).growth_BT
    expected = 1 + 0.3 * np.log([[1, 1, 2, 3]])
    check_close({"growth": np.asarray(growth)}, {"growth": expected.astype(np.float32)}, 3e-7, "growth")  # measured 0


def test_a_field_that_no_layer_has_is_refused() -> None:
    """A setting of grouped attention alone leaves latent layers as they are only where others have it."""
    config = decoder().config
    assert config.with_attention(dropout=0.5).layers[0].attention == dataclasses.replace(LATENT, dropout=0.5)
    with pytest.raises(TypeError, match="windoww: must be a field of some layer's attention"):
        config.with_attention(windoww=3)
