"""No sequences or no positions: an empty answer and statistics of 0, or a clear message; never an internal error."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import (
    Attention,
    AttentionConfig,
    Block,
    BlockConfig,
    Decoder,
    DecoderConfig,
    LatentAttentionConfig,
    LayerConfig,
    LinearAttentionConfig,
    MakeMoE,
    MakeMoEConfig,
    MoE,
    SoftMoE,
    SoftMoEConfig,
    generate,
    losses,
    presets,
)
from jax_moe.attention import attention_by
from parity_tests.porting.decoder_cases import decoder
from parity_tests.shared.quick import QUICK

MIXTRAL, MAKEMOE = presets.mixtral(8, 6, 4, 2), presets.makemoe(8, num_experts=4)
ATTENTION = AttentionConfig(model_dim=8, num_heads=2, dropout=0.1)
SOFT = SoftMoEConfig(model_dim=8, num_experts=2, num_slots=2)
SPARSE = {
    "dropless": MIXTRAL, "makemoe": MAKEMOE, "vmoe": presets.vmoe(8, 6, 4, 2),
    "shared": presets.qwen2_moe(8, 6, 4, 2, shared_dim=4),
    "refuses small groups": MIXTRAL.with_capacity(0.1, group="sequence"),
    "fixed groups": MIXTRAL.with_capacity(1.0, group="fixed", group_size=3),
    **{name: dataclasses.replace(MIXTRAL, dispatcher=name) for name in ("einsum", "ragged", "grouped", "blocks")},
}
LAYERS: dict[str, tuple[Any, Any]] = {
    "soft": (SoftMoE, SOFT), "attention": (Attention, ATTENTION),
    "block": (Block, BlockConfig(attention=ATTENTION, moe=MAKEMOE)),
    "soft block": (Block, BlockConfig(attention=dataclasses.replace(ATTENTION, causal=False), moe=SOFT)),
    **{name: (MoE, config) for name, config in SPARSE.items()},
}
KINDS = (
    LatentAttentionConfig(
        model_dim=8, num_heads=2, plain_dim=4, rope_dim=2, value_dim=5, rank=6,
    ),
    LinearAttentionConfig(model_dim=8, num_key_heads=2, num_value_heads=4, key_dim=4, value_dim=5),
)
SHAPES = [(0, 5), (2, 0), (0, 0)]
TINY = MakeMoEConfig(vocab_size=5, block_size=4, model_dim=4, num_heads=2, num_layers=2, num_experts=2)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_answer_with_nothing(name: str) -> None:
    kind, config = LAYERS[name]
    layer = kind(config, rngs=nnx.Rngs(0))
    call = jax.jit(lambda layer, x_BTD: layer(x_BTD, key=jax.random.key(0)), compiler_options=QUICK)
    for B, T in SHAPES:
        answer = call(layer, jnp.zeros((B, T, 8), jnp.bfloat16))
        y_BTD, stats = (answer, ()) if kind is Attention else answer
        assert y_BTD.shape == (B, T, 8) and y_BTD.dtype == jnp.bfloat16
        for value in stats:
            np.testing.assert_array_equal(np.asarray(value), 0)


@pytest.mark.usefixtures("quick")
def test_models_and_generate() -> None:
    none, no_position = jnp.zeros((0, 3), jnp.int32), jnp.zeros((2, 0), jnp.int32)
    layers = tuple(LayerConfig(attention=kind, ffn=MIXTRAL) for kind in KINDS)
    other = Decoder(DecoderConfig(vocab_size=7, model_dim=8, layers=layers), rngs=nnx.Rngs(0))
    for model, vocab_size in ((MakeMoE(TINY), 5), (decoder("olmoe"), 11), (other, 7)):
        output = model.run(none)
        assert output.logits_BTV.shape == (0, 3, vocab_size)
        np.testing.assert_array_equal(output.stats.load_balance_loss, 0)
        assert generate(model, none, max_new_tokens=3, key=jax.random.key(0)).shape == (0, 6)
        with pytest.raises(ValueError, match=r"^tokens_BT has 0 positions: must be "):
            model(no_position)
        with pytest.raises(ValueError, match=r"^tokens_BT has 0 positions: must be "):
            generate(model, no_position, max_new_tokens=1, temperature=0)


@pytest.mark.parametrize("name", ["plain", "blocks"])
def test_products_of_attention_over_nothing(name: str) -> None:
    """Each way by its name: forward and gradient."""
    layer = Attention(dataclasses.replace(ATTENTION, dropout=0.0), rngs=nnx.Rngs(0))
    for shape in SHAPES:
        with attention_by(name):
            g_BTD = jax.jit(jax.grad(lambda x_BTD: layer(x_BTD).sum()))(jnp.zeros((*shape, 8)))
        assert g_BTD.shape == (*shape, 8)


def test_sizes_of_nothing() -> None:
    for config in SPARSE.values():
        assert config.group_size(0, 5) >= 1 and config.group_size(2, 0) >= 1
        assert config.expert_capacity(0) == 0


def test_losses_of_nothing_are_zero() -> None:
    logits_GSE, expert_GSK = jnp.zeros((0, 3, 4)), jnp.zeros((0, 3, 2), jnp.int32)
    for value in (
        losses.masked_mean(logits_GSE, None), losses.router_z_loss(logits_GSE), losses.router_entropy(logits_GSE),
        losses.expert_load(expert_GSK, 4, jnp.float32), losses.importance(expert_GSK, jnp.zeros((0, 3, 2)), 4),
        losses.smooth_load(logits_GSE, logits_GSE, logits_GSE + 1, 2),
        losses.next_token_loss(logits_GSE, expert_GSK[..., 0]),
    ):
        np.testing.assert_array_equal(np.asarray(value), 0)
