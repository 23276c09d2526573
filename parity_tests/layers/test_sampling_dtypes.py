"""Tokens are drawn with the right frequencies in every dtype of the logits: bf16 noise has 128 values, so ties."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import Decoder, MakeMoE, MakeMoEConfig, generate
from jax_moe.generation.sampling import choose_tokens, filter_logits
from parity_tests.porting.decoder_cases import decoder
from parity_tests.shared.filled import filled
from parity_tests.shared.frequencies import DTYPES, MOST, shares, surprise, zipf

CASES: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "1000 equal": (np.zeros(1000), {}),
    "Zipf": (zipf(8000), {}),
    "Zipf, hot": (zipf(1000), {"temperature": 1.7}),
    "Zipf, top-k": (zipf(1000), {"top_k": 50}),
    "Zipf, top-p": (zipf(1000), {"top_p": 0.7}),
    "Zipf, both": (zipf(1000), {"top_k": 300, "top_p": 0.9}),
    "1000 equal, top-p": (np.zeros(1000), {"top_p": 0.5}),
}
NUM_DRAWS = 2000


@partial(jax.jit, static_argnames=("top_k", "top_p"))
def draws(logits_V: jax.Array, temperature: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """NUM_DRAWS tokens, a few rows at a time."""
    logits_BV = jnp.broadcast_to(logits_V, (50, len(logits_V)))
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS // 50)
    return jax.lax.map(lambda key: choose_tokens(logits_BV, temperature, key, top_k, top_p), keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case: str, dtype: str) -> None:
    if dtype == "float64" and len(CASES[case][0]) > 1000:
        pytest.skip("its draws take long, and the shorter distributions say the same")
    with jax.enable_x64(dtype == "float64"):
        logits, settings = CASES[case]
        logits_V = jnp.asarray(logits, dtype)
        tokens = draws(
            logits_V, jnp.asarray(settings.get("temperature", 1.0), jnp.float32), settings.get("top_k"),
            settings.get("top_p"),
        )
        measured = surprise(np.asarray(tokens), shares(np.asarray(logits_V, np.float64), **settings))
    assert measured < MOST, f"{measured:.1f} standard deviations"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_draw_in_the_logits_own_dtype_is_caught(dtype: str) -> None:
    logits_V = jnp.zeros(1000, dtype)
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS // 50)
    tokens = jax.lax.map(lambda key: jax.random.categorical(key, logits_V, shape=(50,)), keys)
    assert surprise(np.asarray(tokens), shares(np.zeros(1000))) > 1.5 * MOST


def test_a_cut_in_the_logits_own_dtype_is_caught() -> None:
    """In bf16 the cumulative sum of 1000 equal probabilities stops growing long before 1."""
    logits = jnp.zeros((1, 1000), jnp.bfloat16)
    probs = jax.nn.softmax(logits, axis=-1)
    assert int((jnp.cumsum(probs, axis=-1) - probs < 0.5).sum()) != 500
    assert int(jnp.isfinite(filter_logits(logits, top_p=0.5)).sum()) in (500, 501)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_temperature_near_zero_is_greedy(dtype: str) -> None:
    logits = jnp.asarray([[3.0, 40.0, 41.0, -2.0]], dtype)
    for temperature in (1e-3, 1e-38, 1e-42):
        assert int(choose_tokens(logits, jnp.asarray(temperature, jnp.float32), jax.random.key(0))[0]) == 2


def equal_decoder(dtype: str) -> Decoder:
    model = decoder("mixtral", dtype, vocab_size=1000, num_layers=1, sliding_layers=(0,))
    model.head[...] = jnp.zeros_like(model.head[...])
    return model


def equal_makemoe(dtype: str) -> MakeMoE:
    config = MakeMoEConfig(
        vocab_size=1000, block_size=2, model_dim=4, num_heads=2, num_layers=1, num_experts=2, top_k=1,
        capacity_factor=None,
    )
    model = filled(lambda: MakeMoE(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype)), 0)
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    model.head.bias[...] = jnp.asarray(zipf(1000), dtype)
    return model


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("make", [equal_decoder, equal_makemoe])
def test_generate_draws_so_too(make: Any, dtype: str) -> None:
    prompt, model = jnp.zeros((250, 1), jnp.int32), make(dtype)
    drawn = np.asarray(generate(model, prompt, max_new_tokens=16, key=jax.random.key(0)))[:, 1:]
    logits = np.asarray(jnp.asarray(zipf(1000), dtype), np.float64) if isinstance(model, MakeMoE) else np.zeros(1000)
    assert surprise(drawn, shares(logits)) < MOST
