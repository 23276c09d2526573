"""Layers take masks, draws and replayed choices by the same names, and answer in the same form; models too."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import Attention, Block, MakeMoE, ModelOutput, MoE, Randomness, SoftMoE
from parity_tests.layers.bad_arrays import CHOICES, TAKES, TOKENS, X, contracts
from parity_tests.layers.same_calls import (
    TABLE,
    check_form,
    check_names,
    check_padding,
    check_replay,
    model_arrays,
    refused,
)
from parity_tests.porting.decoder_cases import decoder
from parity_tests.shared.filled import filled

pytestmark = pytest.mark.usefixtures("quick")
KINDS = {"moe": MoE, "soft": SoftMoE, "attention": Attention, "block": Block, "soft block": Block}
MODELS: dict[str, Callable[[], Any]] = {
    "makemoe": lambda: filled(lambda: MakeMoE(contracts()["model"])), "decoder": lambda: decoder("qwen2_moe"),
}


def made(name: str) -> Any:
    return filled(lambda: KINDS[name](contracts()[name], rngs=nnx.Rngs(0)))


@functools.cache
def compiled(layer: Any) -> Callable:
    return jax.jit(lambda x, arrays: layer(x, **arrays))


def call(layer: Any, x: np.ndarray, **arrays: Any) -> tuple:
    answer = compiled(layer)(x, arrays)
    y_BTD, stats = (answer, ()) if isinstance(layer, Attention) else answer
    return np.asarray(y_BTD), tuple(map(np.asarray, stats))


@pytest.mark.parametrize("name", TAKES)
def test_every_layer(name: str) -> None:
    layer = made(name)
    takes = {"key", "training", *TAKES["block" if KINDS[name] is Block else name], *TABLE.get(name, ())}
    check_names(layer.__call__, "x_BTD", takes | ({"capacity_limit"} if "expert_BTK" in takes else set()))
    check_form(call, layer, name)
    check_padding(call, layer, name)


def test_a_key_outside_training_draws_nothing() -> None:
    layer, key, x = made("attention"), jax.random.key(0), jnp.asarray(X)
    np.testing.assert_array_equal(layer(x, key=key, training=False), layer(x))
    refused(np.testing.assert_array_equal, layer(x, key=key), layer(x))


def test_a_block_replays_as_its_mixture() -> None:
    block = made("block")
    check_replay(call, block)
    chosen = jax.jit(lambda x, expert: block.run(x, expert_BTK=expert).expert_BTK)(X, CHOICES)
    np.testing.assert_array_equal(chosen, CHOICES)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_a_call_and_run(name: str) -> None:
    model, own = MODELS[name](), {"randomness", "capacity_limit"} if name == "makemoe" else {"position_BT"}
    names = {"key", "training", "mask_BT", "expert_LBTK", "remat", *own}
    check_names(model.__call__, "tokens_BT", names)
    check_names(model.run, "tokens_BT", {*names, "watch"})
    arrays, draws = model_arrays(3 if name == "makemoe" else 2)
    given: dict[str, Any] = arrays | ({"randomness": Randomness(**draws)} if name == "makemoe" else {})
    run = jax.jit(lambda tokens, given: model.run(tokens, **given))
    output = run(TOKENS, given)
    assert isinstance(output, ModelOutput) and output.stages is None
    np.testing.assert_array_equal(output.expert_LBTK, arrays["expert_LBTK"])
    logits_BTV = compiled(model)(TOKENS, given)
    # measured: 0; 2.4e-7 when compiled with shared.quick.QUICK
    np.testing.assert_allclose(logits_BTV, output.logits_BTV, rtol=0, atol=2e-6)
    other = run(TOKENS, {**given, "expert_LBTK": arrays["expert_LBTK"][:, ::-1]})
    refused(np.testing.assert_array_equal, other.logits_BTV, logits_BTV)
