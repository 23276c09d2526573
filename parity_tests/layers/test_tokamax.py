"""tokamax in place of `jax.lax.ragged_dot`: whatever it writes after the last expert's rows has no effect."""

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import MoE, presets
from parity_tests.shared.compare import check_close
from parity_tests.shared.filled import filled
from parity_tests.shared.quick import QUICK

CONFIG = dataclasses.replace(presets.mixtral(model_dim=6, expert_dim=10, num_experts=4, top_k=2), dispatcher="ragged")
MASK = jnp.asarray([[True, True, False, True, False]])  # padding's choices are the rows behind


def answers() -> dict[str, np.ndarray]:
    graphdef, params = nnx.split(filled(lambda: MoE(CONFIG)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 6)), jnp.float32)

    def loss(params: nnx.State, x: jax.Array) -> jax.Array:
        y = nnx.merge(graphdef, params)(x, mask_BT=MASK)[0]
        return (y * jnp.arange(y.size).reshape(y.shape)).sum()

    value, (by_params, by_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=QUICK)(params, x)
    gradients = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(by_params)}
    return {"loss": np.asarray(value), "x": np.asarray(by_x), **gradients}


def install(monkeypatch: pytest.MonkeyPatch, factor: float) -> list[tuple[int, ...]]:
    """A stand-in that puts NaN after the last expert's rows of answers and gradients; and the shapes of its calls."""
    calls: list[tuple[int, ...]] = []

    def spoilt(rows: jax.Array, count: jax.Array) -> jax.Array:
        return factor * jnp.where((jnp.arange(rows.shape[0]) >= count.sum())[:, None], jnp.nan, rows)

    @jax.custom_vjp
    def ragged_dot(x: jax.Array, weight: jax.Array, count: jax.Array) -> jax.Array:
        calls.append(x.shape)
        return spoilt(jax.lax.ragged_dot(x, weight, count), count)

    def backward(saved: tuple, g: jax.Array) -> tuple:
        x, weight, count = saved
        by_x, by_weight = jax.vjp(lambda x, weight: jax.lax.ragged_dot(x, weight, count), x, weight)[1](g)
        return spoilt(by_x, count), by_weight, None

    ragged_dot.defvjp(lambda *args: (ragged_dot(*args), args), backward)
    module = ModuleType("tokamax")
    module.__spec__ = ModuleSpec("tokamax", None)
    module.ragged_dot = ragged_dot  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokamax", module)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    return calls


def test_the_same_answers_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers()
    calls = install(monkeypatch, factor=1)
    found = answers()
    assert set(calls) == {(10, 6), (10, 10)}  # gate and up, down
    check_close(found, expected, 1e-6, "tokamax")  # measured 0: the same products


def test_a_wrong_product_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers()
    install(monkeypatch, factor=1.01)
    with pytest.raises(AssertionError):
        check_close(answers(), expected, 1e-6, "tokamax")
