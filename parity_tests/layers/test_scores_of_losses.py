"""The balance loss and the entropy follow the scores of their router, down to scores that fp32 cannot tell from 0."""

import dataclasses
from collections.abc import Callable
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import losses, presets
from jax_moe.config.moe import BalanceConfig, MoEConfig, RouterConfig, Score
from jax_moe.dispatch import assign_slots
from jax_moe.routing import route

S, E, K = 16, 8, 2
Stats = dict[str, np.ndarray]


def config_of(score: Score, **balance: str) -> MoEConfig:
    counted = BalanceConfig(**balance)  # type: ignore[arg-type]
    return dataclasses.replace(presets.olmoe(4, 4, E, K), router=RouterConfig(score=score), balance=counted)


def in_jax(logits: np.ndarray, config: MoEConfig) -> Stats:
    """Statistics, and the gradient of balance loss plus entropy by the logits."""
    def stats_of(logits_GSE: jax.Array) -> tuple[jax.Array, losses.MoEStats]:
        routing = route(logits_GSE, config, jnp.zeros(E) if config.router.correction_bias else None)
        stats = losses.layer_stats(routing, assign_slots(routing, config, S), config, S)
        return stats.load_balance_loss + stats.router_entropy, stats

    with jax.enable_x64(logits.dtype == np.float64):
        (_, stats), slope = jax.jit(jax.value_and_grad(stats_of, has_aux=True))(jnp.asarray(logits)[None])
    return {**{name: np.asarray(value) for name, value in stats._asdict().items()}, "slope": np.asarray(slope[0])}


def in_torch(logits: np.ndarray, config: MoEConfig) -> Stats:
    torch = pytest.importorskip("torch", reason="the other framework")
    from torch_ref import dispatch, routing
    from torch_ref.losses import layer_stats

    given = torch.from_numpy(logits)[None].requires_grad_()
    routed = routing.route(given, config, torch.zeros(E) if config.router.correction_bias else None)
    stats = layer_stats(routed, dispatch.assign_slots(routed, config, S), config, S)
    (stats.load_balance_loss + stats.router_entropy).backward()
    return {**{name: value.detach().numpy() for name, value in stats._asdict().items()}, "slope": given.grad[0].numpy()}


def probs_of(logits: np.ndarray, score: str) -> np.ndarray:
    """Scores over their sum, in numbers of 80 bits whose exponents reach to 1e-4932."""
    wide = logits.astype(np.longdouble)
    if score == "softmax":
        scores = np.exp(wide - wide.max(axis=-1, keepdims=True))
    elif score == "sigmoid":
        scores = 1 / (1 + np.exp(-wide))
    else:
        scores = np.sqrt(np.log1p(np.exp(wide)))
    return scores / scores.sum(axis=-1, keepdims=True)


Side = Callable[[np.ndarray, MoEConfig], Stats]
both_sides = pytest.mark.parametrize("side", [in_jax, in_torch])


@both_sides
@pytest.mark.parametrize("counted_in", ["batch", "group"])
def test_scores_of_nought_balance(side: Side, counted_in: str) -> None:
    """All scores 0: the choice takes them for equal, and so does the loss."""
    logits = (np.random.default_rng(0).normal(size=(S, E)) * 10 - 150).astype(np.float32)
    config = presets.deepseek_v3(4, 4, E, K, num_clusters=1, top_clusters=1)
    stats = side(
        logits, dataclasses.replace(config, balance=BalanceConfig(counted_in=counted_in))  # type: ignore[arg-type]
    )
    np.testing.assert_array_equal(stats["expert_load_E"], [1 / 2, 1 / 2, *[0] * (E - 2)])
    np.testing.assert_allclose(stats["router_prob_E"], np.full(E, 1 / E), rtol=1e-6)  # measured: 6e-8
    np.testing.assert_allclose(stats["load_balance_loss"], 1, rtol=1e-6)  # a softmax of the logits gives 1e-6 and less
    np.testing.assert_allclose(stats["router_entropy"], log(E), rtol=1e-6)
    assert np.abs(stats["slope"]).max() == 0


@both_sides
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("shift", [-60, -20, 0, 20, 60])
def test_probabilities_are_scores_over_their_sum(side: Side, score: Score, shift: int) -> None:
    logits = np.random.default_rng(1).normal(size=(S, E)) * 3 + shift
    prob = probs_of(logits, score)
    stats = side(logits, config_of(score))
    load = np.bincount(np.argsort(-logits, axis=1)[:, :K].ravel(), minlength=E) / (S * K)
    if shift <= 20 or score != "sigmoid":  # above, sigmoids are 1 but for rounding, and the choice is by ties
        np.testing.assert_array_equal(stats["expert_load_E"], load)
    for name, want in (("router_prob_E", prob.mean(0)), ("router_entropy", -(prob * np.log(prob)).sum(1).mean())):
        np.testing.assert_allclose(stats[name], want.astype(float), rtol=2e-14, err_msg=name)  # measured: 3e-15
    in_fp32 = side(logits.astype(np.float32), config_of(score))
    # measured: 4e-6, at -60
    np.testing.assert_allclose(in_fp32["router_prob_E"], prob.mean(0).astype(float), rtol=2e-5)


@both_sides
@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_the_gradient_is_that_of_the_scores_and_finite_everywhere(side: Side, score: Score) -> None:
    logits = np.random.default_rng(2).normal(size=(S, E)) * 2
    stats, prob = side(logits, config_of(score)), probs_of(logits, score)
    # d ln s / dl: 1 - sigmoid, or sigmoid / (2 softplus); P moves by p_j (delta - p); H by -p (ln p + H)
    sigmoid = 1 / (1 + np.exp(-logits))
    inner = 1 - sigmoid if score == "sigmoid" else sigmoid / (2 * np.log1p(np.exp(logits)))
    f, entropy = stats["expert_load_E"], -(prob * np.log(prob)).sum(1, keepdims=True)
    want = (E * prob * (f - (f * prob).sum(1, keepdims=True)) - prob * (np.log(prob) + entropy)) / S * inner
    np.testing.assert_allclose(stats["slope"], want.astype(float), rtol=0, atol=1e-15)  # measured: 1e-16
    for low in (-40, -80, -100, -1000):
        mixed = np.random.default_rng(3).uniform(low, 40, size=(S, E)).astype(np.float32)
        assert all(np.isfinite(value).all() for value in side(mixed, config_of(score)).values())


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_a_softmax_of_the_logits_is_seen_where_the_score_is_another(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "log_scores", lambda logits_GSE, _: logits_GSE)
    logits = np.random.default_rng(1).normal(size=(S, E))
    wrong = in_jax(logits, config_of(score))["router_prob_E"]
    assert np.allclose(wrong, probs_of(logits, score).mean(0).astype(float), rtol=1e-3) == (score == "softmax")
