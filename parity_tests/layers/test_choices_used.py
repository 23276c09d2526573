"""`ModelOutput.expert_LBTK` holds the choices that made the answer: with a key, under jitter, in uneven groups."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import Decoder, presets
from jax_moe.moe import MoE
from parity_tests.porting.decoder_cases import decoder

MOE = presets.mixtral(8, 6, 4, 2, jitter_eps=0.4)
CONTRACTS = {
    "jitter": MOE,
    "router's jitter": dataclasses.replace(MOE, router=dataclasses.replace(MOE.router, jitter_scope="router")),
    "uneven groups": MOE.with_capacity(1.0, group="fixed", group_size=3),
    "noise": presets.makemoe(8, num_experts=4, top_k=2, capacity_factor=None, dropout=0.0),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 5)), jnp.int32)


def model_of(contract: str, **changes: Any) -> Decoder:
    alike = {"dense_layers": (), "dense_dim": 0, "sliding_layers": (), "sliding_window": None}  # layers compiled once
    return decoder("qwen2_moe", moe=CONTRACTS[contract], **alike, **changes)


def same(one: Any, two: Any) -> None:
    """Raises unless two outputs are the same in every bit."""
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize(("contract", "training"), [*((name, True) for name in CONTRACTS), ("noise", False)])
def test_a_replay_with_the_same_key_is_the_same_run(contract: str, training: bool) -> None:
    model, key = model_of(contract), jax.random.key(3)
    output = model.run(TOKENS, key=key, training=training)
    plain = model.run(TOKENS)
    assert (output.expert_LBTK != plain.expert_LBTK).any(), "the noise moves no choice: the test says nothing"
    same(model.run(TOKENS, key=key, training=training, expert_LBTK=output.expert_LBTK), output)
    counts = jax.nn.one_hot(output.expert_LBTK, 4).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(counts, output.stats.expert_load_E, rtol=1e-6)  # measured: 0
    with pytest.raises(AssertionError):
        same(model.run(TOKENS, key=key, training=training, expert_LBTK=plain.expert_LBTK), output)


def test_they_are_those_of_the_mixture_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every routing that was computed, seen where it is computed."""
    seen: list[Any] = []
    real = MoE._route

    def routing(layer: MoE, x_BTD: jax.Array, **kwargs: Any) -> Any:
        result = real(layer, x_BTD, **kwargs)
        jax.debug.callback(lambda expert: seen.append(np.asarray(expert)), result[1].expert_GSK, ordered=True)
        return result

    monkeypatch.setattr(MoE, "_route", routing)
    model = model_of("jitter")
    output = model.run(TOKENS, key=jax.random.key(3))
    jax.effects_barrier()
    assert len(seen) == model.config.num_layers, "one routing a layer"
    np.testing.assert_array_equal(np.stack(seen).reshape(output.expert_LBTK.shape), output.expert_LBTK)
