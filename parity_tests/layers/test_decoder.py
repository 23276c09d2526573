"""The decoder by itself: padding, windows, scans, keys, and rotary kinds against their equations. Needs no torch."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import Decoder, DecoderConfig, generate, presets
from jax_moe.attention.rope import FREQUENCIES, attention_factor, powers, rotate, rotations
from jax_moe.config.attention import RopeConfig
from jax_moe.models.stack import repeated_units
from parity_tests.shared.compare import check_close
from parity_tests.shared.quick import QUICK

SIZES: dict[str, Any] = {
    "vocab_size": 19, "model_dim": 12, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
    "moe": presets.qwen2_moe(12, 6, 4, 2, shared_dim=4),
}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 7))


def decoder(**changes: Any) -> Decoder:
    """A small decoder with weights large enough for routing and attention to differ between tokens."""
    config = DecoderConfig.grouped(**(SIZES | changes))
    model, generator = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), np.random.default_rng(0)
    flat = nnx.to_flat_state(nnx.state(model))
    filled = [(keys, v.replace(jnp.asarray(generator.normal(size=v.shape) * 0.5, v.dtype))) for keys, v in flat]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


@partial(jax.jit, compiler_options=QUICK)
def call(model: Decoder, tokens: jax.Array, mask: jax.Array, positions: jax.Array) -> jax.Array:
    """Logits."""
    return model(tokens, mask_BT=mask, position_BT=positions)


def logits(model: Decoder, tokens: Any, mask: Any = None, positions: Any = None) -> np.ndarray:
    """Logits; by default without padding and with positions from 0."""
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    return np.asarray(call(model, jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(positions)))


def test_repeated_units() -> None:
    assert repeated_units("MMMM") == [("M", 4)]
    assert repeated_units("DMDMDM") == [("DM", 3)]
    assert repeated_units("DMMDMDM") == [("D", 1), ("M", 2), ("DM", 2)]
    for number in range(2**9):
        kinds = "".join("MD"[number >> i & 1] for i in range(9))
        assert "".join(unit * count for unit, count in repeated_units(kinds)) == kinds


@pytest.mark.parametrize("dense", ["none", "first", "every other"])
def test_program_does_not_grow_with_depth(dense: str) -> None:
    def equations(layers: int) -> int:
        where = {"none": (), "first": (0,), "every other": tuple(range(0, layers, 2))}[dense]
        config = DecoderConfig.grouped(
            **(SIZES | {"num_layers": layers, "dense_layers": where, "dense_dim": 5 if where else 0})
        )
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        return str(jax.make_jaxpr(lambda model: model(jnp.asarray(TOKENS)))(model)).count(" = ")

    assert equations(6) == equations(24)


def test_padding_changes_nothing() -> None:
    model = decoder(sliding_window=3, sliding_layers=(0, 2))
    expected = {"logits": logits(model, TOKENS)}
    for left in (2, 0):
        mask = np.ones((2, 9), bool)
        mask[:, :left] = mask[:, 7 + left:] = False
        padded = np.zeros((2, 9), int)
        padded[mask] = TOKENS.ravel()
        counted = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
        for positions in (None, counted):
            found = {"logits": logits(model, padded, mask, positions)[mask].reshape(2, 7, -1)}
            check_close(found, expected, 2e-6, f"{left} tokens of padding on the left")  # measured 4e-7


def test_window_hides_what_is_behind_it() -> None:
    model = decoder(num_layers=1, sliding_window=3, sliding_layers=(0,))
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 19
    before, after = (logits(model, tokens) for tokens in (TOKENS, changed))
    assert (before[:, :3] != after[:, :3]).any(axis=-1).all()
    np.testing.assert_allclose(before[:, 3:], after[:, 3:], rtol=0, atol=1e-6)


def test_keys_draw_dropout_and_jitter_only_in_training() -> None:
    router = dataclasses.replace(SIZES["moe"].router, noise="input_jitter", jitter_eps=0.2)
    model = decoder(num_layers=1, attention_dropout=0.5, moe=dataclasses.replace(SIZES["moe"], router=router))
    with_key = jax.jit(
        lambda model, key, training: model(jnp.asarray(TOKENS), key=key, training=training), static_argnums=2,
        compiler_options=QUICK,
    )
    drawn = [np.asarray(with_key(model, jax.random.key(seed), True)) for seed in (0, 1, 1)]
    assert (drawn[0] != drawn[1]).any() and (drawn[1] == drawn[2]).all()
    np.testing.assert_allclose(
        np.asarray(with_key(model, jax.random.key(0), False)), logits(model, TOKENS), rtol=1e-5, atol=1e-6
    )


def test_rotary_frequencies_by_their_equations() -> None:
    kept = powers(10000.0, 64)
    assert kept[0] == 1 and kept[16] == pytest.approx(0.01)
    make = {"factor": 4.0, "max_positions": 32, "original_max_positions": 32}
    make |= {"short_factors": (2.0,) * 32, "long_factors": (3.0,) * 32, "short_mscale": 1.1, "long_mscale": 1.2}
    found = {kind: FREQUENCIES[kind](RopeConfig(kind=kind, **make), 64, 128) for kind in FREQUENCIES}
    long = RopeConfig(kind="longrope", **make)
    np.testing.assert_allclose(found["longrope"], kept / 3)
    np.testing.assert_allclose(FREQUENCIES["longrope"](long, 64, 32), kept / 2)
    assert [attention_factor(long, length) for length in (32, 33)] == [1.1, 1.2]
    np.testing.assert_allclose(found["linear"], kept / 4)
    # dynamic: at factor 4, four times the trained length has base theta * 13^(64/62); up to that length it is unchanged
    np.testing.assert_allclose(found["dynamic"], powers(10000.0 * 13 ** (64 / 62), 64))
    np.testing.assert_allclose(FREQUENCIES["dynamic"](RopeConfig(kind="dynamic", **make), 64, 32), kept)
    for kind in ("yarn", "llama3"):  # the fastest pair is unchanged, the slowest divided by the factor
        assert found[kind][0] == pytest.approx(kept[0]) and found[kind][-1] == pytest.approx(kept[-1] / 4)
        assert (np.diff(found[kind]) < 0).all()
    assert attention_factor(RopeConfig(kind="yarn", **make)) == pytest.approx(0.1 * np.log(4) + 1)


LONG = RopeConfig(
    kind="longrope", theta=100.0, original_max_positions=3, short_factors=(2.0, 1.0), long_factors=(4.0, 5.0),
    short_mscale=2.0, long_mscale=3.0,
)


@pytest.mark.parametrize(("length", "factors", "scale"), [(3, (2.0, 1.0), 2.0), (4, (4.0, 5.0), 3.0)])
def test_longrope_turns_a_text_by_its_length(length: int, factors: tuple[float, float], scale: float) -> None:
    """The same positions in a text of three tokens and in one of four, told while tracing and while running."""
    first, second = 1 / factors[0], 1 / (10 * factors[1])
    want = scale * np.cos([[0, 0], [first, second], [2 * first, 2 * second]])
    whole = rotations(jnp.arange(length)[None], LONG, 4, jnp.dtype("float32"))[0]
    told = jax.jit(lambda length: rotations(jnp.arange(3)[None], LONG, 4, jnp.dtype("float32"), length, 9)[0])
    for found in (whole[0, :3, :2], told(jnp.asarray(length))[0, :, :2]):
        check_close({"cos": np.asarray(found)}, {"cos": want}, 5e-7, "longrope")  # measured 8e-8


def test_a_text_does_not_grow_to_where_longrope_changes() -> None:
    """A text of two tokens reads one of two new ones; the longest text decides, and one that is long goes on."""
    model = decoder(rope=LONG, num_layers=1)
    short, long = (np.ones((1, length), np.int32) for length in (2, 4))
    with pytest.raises(ValueError) as caught:
        generate(model, short, max_new_tokens=3, temperature=0)
    assert str(caught.value) == (
        "max_new_tokens=3: must be at most 2 after 2 tokens: rotary embeddings of kind 'longrope' turn texts of more "
        "than original_max_positions=3 otherwise, from their first token on"
    )
    for tokens, more in ((short, 2), (long, 3)):
        found = np.asarray(generate(model, tokens, max_new_tokens=more, temperature=0))
        for step in range(more):  # the text again without a cache
            length = tokens.shape[1] + step
            assert logits(model, found[:, :length])[0, -1].argmax() == found[0, length]


def test_a_part_of_each_head_turns() -> None:
    """Of six entries the first four are two pairs, (1, 3) and (2, 4), at position 1 by the angles 1 and 1/10."""
    config = RopeConfig(theta=100.0, fraction=0.7)
    turns = rotations(jnp.asarray([[1]]), config, 6, jnp.dtype("float32"))
    found = rotate(jnp.asarray([[[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]]), *turns)[0, 0, 0]
    (c, s), (d, t) = ((np.cos(angle), np.sin(angle)) for angle in (1.0, 0.1))
    expected = np.asarray([c - 3 * s, 2 * d - 4 * t, 3 * c + s, 4 * d + 2 * t, 5, 6])
    check_close({"x": np.asarray(found)}, {"x": expected}, 1e-6, "partial rotation")  # measured 1.2e-7


def test_neighbours_turn_together() -> None:
    """Of four entries the pairs (1, 2) and (3, 4), at position 1 by the angles 1 and 1/10."""
    config = RopeConfig(theta=100.0, pairs="neighbours")
    turns = rotations(jnp.asarray([[1]]), config, 4, jnp.dtype("float32"))
    found = rotate(jnp.asarray([[[[1.0, 2.0, 3.0, 4.0]]]]), *turns, config.pairs)[0, 0, 0]
    (c, s), (d, t) = ((np.cos(angle), np.sin(angle)) for angle in (1.0, 0.1))
    expected = np.asarray([c - 2 * s, 2 * c + s, 3 * d - 4 * t, 4 * d + 3 * t])
    check_close({"x": np.asarray(found)}, {"x": expected}, 1e-6, "neighbours")  # measured 1.2e-7


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope": RopeConfig(fraction=0.75)}, r"head_dim times rope.fraction=0.75=3: must be even"),
    ({"rope": LONG, "head_dim": 6}, r"head_dim=6: must be twice the number of short_factors, 2"),
    ({"num_kv_heads": 3}, r"num_kv_heads=3: must be a divisor of num_heads=4"),
    ({"head_dim": 5}, r"head_dim=5: must be even"),
    ({"dense_layers": (3,), "dense_dim": 4}, r"dense_layers=\(3,\): must be rising layer numbers of 0 to 2"),
    ({"dense_layers": (0,)}, r"dense_dim=0: must be above 0 exactly when"),
    ({"dense_layers": (0, 1, 2), "dense_dim": 4}, r"must be fewer than all layers"),
    ({"sliding_window": 4}, r"sliding_layers=\(\): must be set exactly when"),
    ({"moe": presets.mixtral(8, 6, 4, 2)}, r"moe.model_dim=8: must be model_dim=12"),
    ({"attention_dropout": 1.0}, r"attention_dropout=1.0: must be"),
    ({"vocab_size": True}, r"vocab_size=True: must be an integer"),
])
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.grouped(**(SIZES | changes))


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_the_part_that_turns_is_a_fraction(fraction: Any) -> None:
    with pytest.raises(ValueError, match=r"fraction=.*: must be a number above 0 and at most 1"):
        RopeConfig(fraction=fraction)


def test_tokens_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="token 19: must be 0 to 18"):
        decoder()(jnp.full((1, 2), 19))
