"""A made-up kind of attention, mixed with grouped layers: forward, gradient, cache, generation and folders. No
torch.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import Decoder, DecoderConfig, attention, generate, presets
from jax_moe.attention.positions import whole_call
from jax_moe.config.as_json import config_from_json, config_to_json
from jax_moe.config.decoder import LayerConfig
from jax_moe.generation.cache import decode, prefill
from parity_tests.shared.compare import check_close
from parity_tests.shared.filled import filled
from parity_tests.shared.mean_family import MeanConfig, add

pytestmark = pytest.mark.usefixtures("quick", "small_programs")


MEAN = MeanConfig(model_dim=12, width=6)
START, PROMPT = (2, 0), 5
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 9)).astype(np.int32)
MASK = np.arange(9) >= np.asarray(START)[:, None]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch)


def mixed(num_layers: int = 6) -> DecoderConfig:
    """Grouped, mean, mean with another scale, and so on; the second of three has no mixture."""
    moe = presets.qwen2_moe(12, 6, 4, 2, shared_dim=4)
    base = DecoderConfig.grouped(
        vocab_size=19, model_dim=12, num_layers=num_layers, num_heads=4, num_kv_heads=2, head_dim=4, moe=moe,
        dense_layers=tuple(range(1, num_layers, 3)), dense_dim=5, sliding_window=3, sliding_layers=(0,),
    )

    def attends(i: int, layer: LayerConfig) -> Any:
        return (layer.attention, MEAN, dataclasses.replace(MEAN, scale=0.5))[i % 3]

    layers = tuple(dataclasses.replace(one, attention=attends(i, one)) for i, one in enumerate(base.layers))
    return dataclasses.replace(base, layers=layers)


def model(config: DecoderConfig | None = None) -> Decoder:
    return filled(lambda: Decoder(config or mixed(), rngs=nnx.Rngs(0)))


def test_stacks_and_json() -> None:
    """Layers that differ in their window or scale alone share a stack."""
    config = mixed()
    layers = {name: stack.layers for name, stack in config.stacks.items()}
    assert layers == {"blocks": (0, 3), "blocks_mean": (1, 2, 4, 5), "moe": (0, 2, 3, 5), "dense": (1, 4)}
    assert config.shorthand is None and config.sliding_layers == (0,)
    assert config_from_json(DecoderConfig, json.loads(json.dumps(config_to_json(config))), "config") == config
    with pytest.raises(ValueError, match="kind='mena': must be one of 'grouped', 'latent', 'linear', 'mean'"):
        text = json.dumps(config_to_json(config)).replace('"grouped"', '"mena"')
        config_from_json(DecoderConfig, json.loads(text), "config")


def test_a_kind_that_is_not_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(attention.KINDS, MeanConfig)
    with pytest.raises(ValueError, match="attention=MeanConfig: must be one of GroupedAttentionConfig, "):
        model()


def by_hand(made: Decoder) -> np.ndarray:
    """Logits, layer after layer in numpy's order: no scan, every row of a stack picked by hand."""
    config = made.config
    x_BTD = made.embed(jnp.asarray(TOKENS))
    position_BT = jnp.asarray(np.maximum(np.cumsum(MASK, axis=1) - 1, 0))
    positions = whole_call(9, position_BT, jnp.asarray(MASK))
    for i, layer in enumerate(config.layers):
        parts = []
        for name in config.stacks_of(i):
            graph, state = nnx.split(getattr(made, name))
            row = config.stacks[name].layers.index(i)
            parts.append(nnx.merge(graph, jax.tree.map(lambda w, row=row: w[row], state)))
        block, ffn = parts
        block.attention.config = layer.attention
        shared = attention.kind_of(layer.attention).shared(layer.attention, positions, x_BTD.dtype)
        attended = block.attention(normed(block, "attention_norm", x_BTD, config), positions, shared)[0]
        x_BTD += normed(block, "attention_out_norm", attended, config)
        into = normed(block, "ffn_norm", x_BTD, config)
        if i in config.moe_layers:
            answer = ffn(into, training=False, mask_BT=jnp.asarray(MASK))[0]
        else:
            w = ffn.weights()
            answer = (jax.nn.silu(into @ w["gate"][0]) * (into @ w["up"][0])) @ w["down"][0]
        x_BTD += normed(block, "ffn_out_norm", answer, config)
    return np.asarray(made.compare(normed(made, "final_norm", x_BTD, config)))


def normed(module: Any, name: str, x: Any, config: DecoderConfig) -> Any:
    """By numpy, in fp64; the input itself where there is no such norm."""
    norm, x = getattr(module, name, None), np.asarray(x, np.float64)
    if norm is None:
        return jnp.asarray(x, jnp.float32)
    layer = config.norm == "layer"
    x = x - x.mean(-1, keepdims=True) if layer else x
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * np.asarray(norm.scale[...])
    return jnp.asarray(x + np.asarray(norm.bias[...]) if layer else x, jnp.float32)


def test_forward_prefill_decode_and_generation() -> None:
    """One call, layers by hand, and the cache agree; a planted fault (another scale) is seen. Measured: 3e-7."""
    made = model()
    position_BT = jnp.asarray(np.maximum(np.cumsum(MASK, axis=1) - 1, 0))
    whole = jax.jit(lambda made: made(jnp.asarray(TOKENS), mask_BT=jnp.asarray(MASK), position_BT=position_BT))(made)
    check_close({"logits": by_hand(made)[MASK]}, {"logits": np.asarray(whole)[MASK]}, 3e-6, "by hand")
    start_B = jnp.asarray(START, jnp.int32)
    logits, cache = jax.jit(lambda made: prefill(made, jnp.asarray(TOKENS[:, :PROMPT]), start_B, 12))(made)
    assert cache.kept["blocks_mean"].shape == (4, 2, 6), "a state of constant size"
    found, step = [logits], jax.jit(decode)
    for slot in range(PROMPT, 9):
        logits, cache = step(made, jnp.asarray(TOKENS[:, slot]), jnp.asarray(slot, jnp.int32), start_B, cache)
        found.append(logits)
    check_close({"logits": np.stack(found, 1)}, {"logits": np.asarray(whole)[:, PROMPT - 1 :]}, 3e-6, "cached")
    tokens = np.asarray(generate(made, TOKENS, max_new_tokens=4, temperature=0, mask_BT=MASK))
    np.testing.assert_array_equal(tokens[:, 9], np.asarray(whole)[:, -1].argmax(-1))
    made.config = mixed().with_layers(
        lambda one: dataclasses.replace(one, attention=MEAN) if isinstance(one.attention, MeanConfig) else one
    )
    assert np.abs(by_hand(made) - np.asarray(whole))[MASK].max() > 1e-2


@pytest.mark.parametrize(("norm", "place"), [("layer", "around"), ("rms", "after")])
def test_norms_by_kind_and_place(norm: str, place: str) -> None:
    """A dense layer and one with a mixture; two norms exchanged are seen. Measured: 5e-7."""
    config = dataclasses.replace(mixed(3), layers=mixed(3).layers[1:], norm=norm, norm_place=place, norm_eps=1e-2)
    made, rng = model(config), np.random.default_rng(1)
    blocks = made.blocks_mean
    for each in ("attention_norm", "ffn_norm", "attention_out_norm", "ffn_out_norm"):
        assert hasattr(blocks, each) == (place == "around" or each.endswith("out_norm"))
        if hasattr(blocks, each):
            scale = getattr(blocks, each).scale
            scale[...] = jnp.asarray(rng.uniform(0.5, 2, scale.shape), jnp.float32)
    position_BT = jnp.asarray(np.maximum(np.cumsum(MASK, axis=1) - 1, 0))
    whole = jax.jit(lambda made: made(jnp.asarray(TOKENS), mask_BT=jnp.asarray(MASK), position_BT=position_BT))(made)
    check_close({"logits": by_hand(made)[MASK]}, {"logits": np.asarray(whole)[MASK]}, 3e-6, "by hand")
    first, second = blocks.attention_out_norm, blocks.ffn_out_norm
    first.scale[...], second.scale[...] = second.scale[...], first.scale[...]
    assert np.abs(by_hand(made) - np.asarray(whole))[MASK].max() > 1e-2


def test_gradients_reach_every_row_and_depth_costs_nothing() -> None:
    def loss(made: Decoder) -> jax.Array:
        return jnp.square(made(jnp.asarray(TOKENS))).mean()

    gradients = nnx.to_flat_state(nnx.state(jax.jit(jax.grad(loss))(model())))
    for path, gradient in gradients:
        if path[0] != "embedding":
            rows = np.abs(np.asarray(gradient[...])).reshape(gradient.shape[0], -1).max(axis=1)
            assert (rows > 0).all(), f"{path}: a row without a gradient"

    def equations(num_layers: int) -> int:
        config = dataclasses.replace(mixed(3), layers=mixed(3).layers * (num_layers // 3))
        shapes = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        return str(jax.make_jaxpr(jax.grad(loss))(shapes)).count(" = ")

    assert equations(6) == equations(24)
