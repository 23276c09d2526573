"""Gradients of the losses against formulas in numpy and against a simulation. Values: `test_pencil.py`."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import losses, presets
from jax_moe.config.moe import BalanceConfig, MoEConfig
from jax_moe.dispatch import assign_slots
from jax_moe.routing import route

G, S, E, K = 2, 6, 5, 2
MASK = np.asarray([[True] * 6, [True, False, True, True, False, False]])
CONFIG = presets.olmoe(4, 4, E, K)


@pytest.fixture(autouse=True, scope="module")
def fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def logits_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(G, S, E))


def softmax(x: np.ndarray) -> np.ndarray:
    share = np.exp(x - x.max(-1, keepdims=True))
    return share / share.sum(-1, keepdims=True)


def stats_of(logits: jax.Array, config: MoEConfig, mask: np.ndarray | None) -> losses.MoEStats:
    mask_GS = None if mask is None else jnp.asarray(mask)
    routing = route(logits, config)
    capacity = config.expert_capacity(S)
    return losses.layer_stats(routing, assign_slots(routing, config, capacity, mask_GS), config, capacity, mask_GS)


def gradient(loss: Callable, logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(logits)))


def agree(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-15)  # measured: 1.1e-16


def counted_share(logits: np.ndarray, real: np.ndarray) -> np.ndarray:
    """f: how often each expert is among the K best of a real token, over all choices."""
    chosen = np.argsort(-logits, axis=-1)[..., :K][real]
    return np.bincount(chosen.ravel(), minlength=E) / chosen.size


@pytest.mark.parametrize("mask", [None, MASK], ids=["no padding", "padding"])
@pytest.mark.parametrize(("f_sums_to", "times"), [("one", 1), ("k", K)])
def test_gradient_of_the_balance_loss(mask: np.ndarray | None, f_sums_to: str, times: int) -> None:
    # L = E sum_e f_e P_e with f held fixed: dL/dl_tj = E / tokens * p_tj (f_j - sum_e f_e p_te)
    config = dataclasses.replace(CONFIG, balance=BalanceConfig(f_sums_to=f_sums_to))
    logits, real = logits_of(0), np.ones((G, S), bool) if mask is None else mask
    p, f = softmax(logits), times * counted_share(logits, real)
    want = E / real.sum() * p * (f - (f * p).sum(-1, keepdims=True)) * real[..., None]
    agree(gradient(lambda logits: stats_of(logits, config, mask).load_balance_loss, logits), want)


def test_gradient_of_the_pooled_balance_loss() -> None:
    # two layers: f and P are averaged first, so each layer's gradient sees the other's f. L = E sum_e f_e P_e
    config = dataclasses.replace(CONFIG, balance=BalanceConfig(f_sums_to="k", pooled="over_layers"))
    layers = np.stack([logits_of(1), logits_of(2)])
    real = np.ones((G, S), bool)
    f = K * np.mean([counted_share(one, real) for one in layers], axis=0)
    p = softmax(layers)
    want = E / (2 * G * S) * p * (f - (f * p).sum(-1, keepdims=True))

    def pooled(layers: jax.Array) -> jax.Array:
        each = [stats_of(one, config, None) for one in layers]
        return losses.pool_balance_loss(jax.tree.map(lambda *x: jnp.stack(x), *each), config)

    agree(gradient(pooled, layers), want)


@pytest.mark.parametrize("mask", [None, MASK], ids=["no padding", "padding"])
def test_gradient_of_the_z_loss(mask: np.ndarray | None) -> None:
    # d lse^2 = 2 lse softmax
    logits, real = logits_of(3) + 2, np.ones((G, S), bool) if mask is None else mask
    lse = np.log(np.exp(logits).sum(-1, keepdims=True))
    want = 2 * lse * softmax(logits) / real.sum() * real[..., None]
    agree(gradient(lambda logits: stats_of(logits, CONFIG, mask).router_z_loss, logits), want)


def test_gradient_of_the_entropy() -> None:
    # dH/dl_j = -p_j (ln p_j + H)
    logits = logits_of(4)
    p = softmax(logits)
    entropy = -(p * np.log(p)).sum(-1, keepdims=True)
    agree(
        gradient(lambda logits: stats_of(logits, CONFIG, None).router_entropy, logits),
        -p * (np.log(p) + entropy) / (G * S),
    )


def test_importance_has_a_gradient_and_load_has_none() -> None:
    logits = logits_of(5)
    slope = gradient(lambda logits: stats_of(logits, CONFIG, MASK).importance_cv2, logits)
    assert np.abs(slope[MASK]).max() > 1e-3 and (slope[~MASK] == 0).all()
    # by a central difference along the gradient itself; measured 3e-11 of it
    step = 1e-5 * slope / np.linalg.norm(slope)
    ends = [float(stats_of(jnp.asarray(logits + sign * step), CONFIG, MASK).importance_cv2) for sign in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, np.linalg.norm(slope), rtol=3e-10)
    assert (gradient(lambda logits: stats_of(logits, CONFIG, MASK).load_cv2, logits) == 0).all()


def test_a_batch_of_nothing_but_padding_is_finite() -> None:
    nothing = np.zeros((G, S), bool)
    for value in stats_of(jnp.asarray(logits_of(6)), CONFIG, nothing):
        assert np.isfinite(value).all() and (np.asarray(value) == 0).all()
    slope = gradient(lambda logits: sum(jnp.sum(value) for value in stats_of(logits, CONFIG, nothing)), logits_of(6))
    assert (slope == 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_smooth_load_is_the_chance_of_being_chosen_again(top_k: int) -> None:
    # Draw one expert's noise again, 20000 times, and count how often it is then among the best. Four standard errors
    rng = np.random.default_rng(7)
    clean, scale = rng.normal(size=(1, 1, E)), rng.uniform(0.3, 1.5, size=(1, 1, E))
    noisy = clean + scale * rng.normal(size=(1, 1, E))
    load = np.asarray(losses.smooth_load(*map(jnp.asarray, (clean, noisy, scale)), top_k))
    for e in range(E):
        redrawn = clean[0, 0, e] + scale[0, 0, e] * rng.normal(size=20_000)
        bar = np.sort(np.delete(noisy[0, 0], e))[-top_k]
        error = max((load[e] * (1 - load[e]) / 20_000) ** 0.5, 1e-4)
        assert abs((redrawn > bar).mean() - load[e]) < 4 * error


def test_smooth_load_has_a_gradient() -> None:
    # chance = Phi((clean - bar) / scale): slope phi(...) / scale by the clean logit
    clean, noisy, scale = logits_of(8), logits_of(9), np.full((G, S, E), 0.7)
    slope = gradient(lambda c: losses.smooth_load(c, jnp.asarray(noisy), jnp.asarray(scale), K).sum(), clean)
    order = np.sort(noisy, axis=-1)
    bar = np.where(noisy >= order[..., -K, None], order[..., -K - 1, None], order[..., -K, None])
    agree(slope, np.exp(-(((clean - bar) / scale) ** 2) / 2) / np.sqrt(2 * np.pi) / scale)
