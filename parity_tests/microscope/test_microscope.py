"""The microscope against `torch_ref`: sound models pass, every planted fault is located, a near tie is a flip."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the other side is PyTorch")

import jax_moe
from jax_moe.porting.checkpoint import Checkpoint
from moe_parity.choices import compare_choices
from moe_parity.compare import compare_checkpoint, compare_traces, cotangent, settings
from moe_parity.sides.torch_ref import trace_torch_ref
from moe_parity.stages import Place, Stage, StageResult, first_divergence, judge, pair
from parity_tests.porting.porting_cases import SOFT, TINY, make
from parity_tests.shared.filled import filled
from parity_tests.table.cases import DEEPSEEK, ON_INPUT, overflow

pytestmark = pytest.mark.usefixtures("quick")
SMALL = dataclasses.replace(TINY, num_layers=2)
LAYERS = {"drops by choice": overflow("choice"), "deepseek_v3": DEEPSEEK, "weight on input": ON_INPUT}


def tokens(batch_size: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(0, SMALL.vocab_size, (batch_size, SMALL.block_size))


def model() -> Any:
    return filled(lambda: jax_moe.MakeMoE(SMALL), seed=3)


def worst(results: tuple[StageResult, ...] | list[StageResult]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in results:
        found[one.kind] = max(found.get(one.kind, 0.0), one.error)
    return found


def test_a_healthy_language_model_passes() -> None:
    """Measured: stages 1.1e-15, gradients 2.0e-14."""
    report = compare_checkpoint(Checkpoint("makemoe", model()), tokens(), dtype="float64", grads=True)
    assert report.passed, report.sentence()
    kinds = worst(report.results)
    assert set(kinds) == {
        "checkpoint", "embedding", "attention_norm", "attention", "ffn_norm", "router_logits", "experts", "weights",
        "slots", "expert_outputs", "combined", "residual", "balance_loss", "logits", "loss", "own_call", "gradient",
    }
    assert kinds.pop("gradient") <= 1e-13 and max(kinds.values()) <= 1e-14
    assert sum(one.kind == "gradient" for one in report.results) == 70


@pytest.mark.parametrize("name", LAYERS)
def test_healthy_layers_pass(name: str) -> None:
    """Drops by choice, clusters with a correction bias and a shared expert, weights on the input."""
    layer = filled(lambda: jax_moe.MoE(LAYERS[name]), seed=2)
    x = np.random.default_rng(0).standard_normal((2, 6, layer.config.model_dim))
    report = compare_checkpoint(Checkpoint("moe", layer), x, dtype="float64", grads=name == "deepseek_v3")
    assert report.passed, report.sentence()
    assert {one.kind for one in report.results} >= {"slots", "expert_outputs", "combined"}


def test_switch_without_capacity_still_balances_each_sequence() -> None:
    """Nothing is dropped, and the loss is the mean of the sequences' own; measured: 0."""
    config = jax_moe.presets.switch(8, 6, 4, capacity_factor=None, jitter_eps=0.0, balance_per_sequence=True)
    layer = filled(lambda: jax_moe.MoE(config), seed=2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7, 8)), jnp.float32)
    stats = layer(x)[1]
    alone = [float(layer(x[i : i + 1])[1].load_balance_loss) for i in range(3)]
    assert float(stats.dropped_fraction) == 0 and np.ptp(alone) > 1e-2
    np.testing.assert_allclose(float(stats.load_balance_loss), np.mean(alone), rtol=1e-6)


def test_a_healthy_soft_moe_passes() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 8))
    report = compare_checkpoint(Checkpoint("soft_moe", make("soft_moe", 1)), x, dtype="float64", grads=True)
    assert report.passed and {one.name for one in report.results} >= {
        "weights (dispatch)", "slot inputs", "expert outputs"
    }, SOFT


def swap_router(blocks: Any) -> None:
    kernel = blocks.moe.router.kernel[...]
    blocks.moe.router.kernel[...] = kernel.at[1, [0, 1]].set(kernel[1, [1, 0]])


def swap_experts(blocks: Any) -> None:
    up = blocks.moe.experts.up[...]
    blocks.moe.experts.up[...] = up.at[1, [0, 1]].set(up[1, [1, 0]])


def other_norm(blocks: Any) -> None:
    blocks.moe_norm.epsilon = 2e-5


def other_scale(blocks: Any) -> None:
    """By sqrt(head_dim) in place of makeMoE's sqrt(model_dim)."""
    blocks.attention.config = dataclasses.replace(blocks.attention.config, scale="head_dim")


FAULTS: list[tuple[Callable[[Any], None], str]] = [
    (swap_router, "layer 1: router logits"), (swap_experts, "layer 1: expert outputs"),
    (other_norm, "layer 0: norm before the FFN"), (other_scale, "layer 0: attention"),
]


@pytest.fixture(scope="module")
def theirs() -> dict[Place, np.ndarray]:
    """The healthy other side, in fp64."""
    weights = {name: np.asarray(value, np.float64) for name, value in jax_moe.to_torch(model()).items()}
    return trace_torch_ref(SMALL, weights, tokens(), None, False)


@pytest.mark.parametrize(("fault", "where"), FAULTS, ids=lambda one: getattr(one, "__name__", None))
def test_a_planted_fault_is_named(fault: Callable[[Any], None], where: str, theirs: dict[Place, np.ndarray]) -> None:
    with settings("float64"):
        ours = filled(lambda: jax_moe.MakeMoE(SMALL, param_dtype="float64"), seed=3)
        jax_moe.from_torch(ours, jax_moe.to_torch(model()), cast=True)
        fault(ours.blocks)
        results = compare_traces(ours, tokens(), theirs, dtype="float64")
    first = first_divergence(results)
    assert first is not None and first.name == where and first.verdict == "wrong number"
    assert not next(one for one in results if one.kind == "logits").passed


def tied(upper: int) -> Any:
    """Two columns of layer 1's router equal but for 1e-7, the larger at `upper`."""
    made = model()
    router = made.blocks.moe.router
    kernel, bias = np.array(router.kernel[...]), np.array(router.bias[...])
    kernel[1, :, 1], bias[1, 1] = kernel[1, :, 0], bias[1, 0]
    kernel[1, :, upper] *= np.float32(1 + 1.2e-7)
    bias[1, upper] *= np.float32(1 + 1.2e-7)
    router.kernel[...], router.bias[...] = kernel, bias
    return made


def test_a_flip_at_a_near_tie_is_told_from_a_wrong_number() -> None:
    x = tokens(12)
    weights = {name: np.asarray(value) for name, value in jax_moe.to_torch(tied(0)).items()}
    other = trace_torch_ref(SMALL, weights, x, None, True)
    with settings("float32"):
        followed = compare_traces(tied(1), x, other, dtype="float32", grads=True)
        alone = compare_traces(tied(1), x, other, dtype="float32", replay=False)
    flips = [one for one in followed if one.num_flips]
    assert [one.name for one in flips] == ["layer 1: chosen experts"] and flips[0].verdict == "flip at a near tie"
    flip = flips[0].flips[0]
    assert 0 < flip.margin < 1e-6 < flips[0].noise and {flip.ours, flip.theirs} == {0, 1}  # type: ignore[operator]
    assert first_divergence(followed) is None, "with their choices everything after the flip agrees"
    assert sum(one.kind == "gradient" for one in followed) == 70
    first = first_divergence(alone)
    assert first is not None and first.layer == 1 and first.kind in ("weights", "slots", "expert_outputs")


def test_another_rule_of_choosing_is_a_wrong_number(theirs: dict[Place, np.ndarray]) -> None:
    """The same logits, the second best chosen first: no tie explains it."""
    place = Place("experts", 1)
    turned = {**theirs, place: theirs[place][..., ::-1].copy()}
    with settings("float64"):
        ours = filled(lambda: jax_moe.MakeMoE(SMALL, param_dtype="float64"), seed=3)
        jax_moe.from_torch(ours, jax_moe.to_torch(model()), cast=True)
        first = first_divergence(compare_traces(ours, tokens(), turned, dtype="float64"))
    assert first is not None and first.name == "layer 1: chosen experts" and first.verdict == "wrong number"
    assert "beyond the" in first.where and first.agreement == 0


def test_one_row_of_a_gradient_zeroed_is_seen() -> None:
    layer = make("moe_mixtral", 1)
    x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
    weights = {name: np.asarray(value) for name, value in jax_moe.to_torch(layer).items()}
    other = trace_torch_ref(layer.config, weights, x, cotangent(x), True)
    name = Place("gradient", None, "experts.2.up.weight")
    with settings("float32"):
        assert first_divergence(compare_traces(layer, x, other, dtype="float32", grads=True)) is None
        other[name] = other[name].copy()
        other[name][3] = 0
        failed = [one.name for one in compare_traces(layer, x, other, dtype="float32", grads=True) if not one.passed]
    assert failed == ["gradient of experts.2.up.weight"]


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (np.zeros(3), np.zeros(4), "shape (3,) in JAX, (4,) in the reference"),
        (np.array([np.nan]), np.array([np.nan]), "NaN or infinity"),
        (np.array([1.0, 2.0]), np.array([1.0, 0.0]), "at [1]: 2 in JAX, 0 in the reference"),
        (np.array([1.0]), np.array([0.0]), "1 in JAX, 0 in the reference"),
    ],
)
def test_judge_says_why(ours: np.ndarray, theirs: np.ndarray, words: str) -> None:
    result = judge(Stage("a", None, "attention", ours, theirs, 1e-5))
    assert not result.passed and words in result.where and result.error >= 1


def test_pair_keeps_what_both_have_and_gradients_of_one_side_alone() -> None:
    one = np.ones(2)
    ours = {Place("embedding"): one, Place("logits"): one, Place("gradient", None, "a"): one}
    theirs = {Place("embedding"): one, Place("loss"): one, Place("gradient", None, "b"): 3 * one}
    stages = pair(ours, theirs, {"": 1e-5, "gradient": 1e-4})
    assert [stage.name for stage in stages] == ["embedding", "gradient of a", "gradient of b"]
    assert [judge(stage).verdict for stage in stages] == ["same", "wrong number", "wrong number"]
    assert "on one side only" in judge(stages[2]).where and stages[1].tolerance == 1e-4


def test_choices_by_hand() -> None:
    """The second choice differs: its margin is 0.1 in JAX and 0.2 in the reference, whose largest score is 0.5."""
    ours, theirs = np.array([[0, 1]]), np.array([[0, 2]])
    scores = np.array([[0.5, 0.3, 0.2]]), np.array([[0.5, 0.1, 0.3]])
    wide, narrow = (compare_choices(ours, theirs, *scores, tolerance) for tolerance in (0.41, 0.39))
    assert (wide.verdict, narrow.verdict) == ("flip at a near tie", "wrong number")
    assert (wide.num_flips, wide.agreement, wide.flips[0].index) == (1, 0.5, (0, 1))
    np.testing.assert_allclose([wide.widest, wide.error, wide.noise, wide.closest], [0.2, 0.4, 0.205, 0.2], rtol=1e-12)
    assert compare_choices(theirs, theirs, *scores, 0.0).verdict == "same"
    many = np.arange(200)[:, None] % 2
    found = compare_choices(many, 1 - many, np.linspace(0, 1, 400).reshape(200, 2) ** 2, np.zeros((200, 2)), 0.1)
    assert (found.num_flips, len(found.flips)) == (200, 100) and found.flips[0].index == (199, 0)
