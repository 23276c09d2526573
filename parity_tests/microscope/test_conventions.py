"""Every known convention planted into one side is named by a comparison with the unchanged side."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe.config.decoder import DecoderConfig
from jax_moe.config.moe import BalanceConfig, CapacityConfig, ExpertConfig, MoEConfig, RouterConfig
from moe_parity.explanation import search
from moe_parity.explanation.conventions import changed, conventions_of
from moe_parity.explanation.search import Answer, distance, explain, explain_traces, in_words, our_answer
from moe_parity.stages import Place
from parity_tests.shared.filled import filled

pytestmark = pytest.mark.usefixtures("quick")
SIZES: dict[str, Any] = {"model_dim": 6, "expert_dim": 6, "num_experts": 6, "top_k": 2, "dispatcher": "einsum"}
LAYER = MoEConfig(
    **SIZES,
    router=RouterConfig(
        score="sigmoid", renormalise_eps=1e-2, scale=2.5, bias=True, correction_bias=True, num_clusters=2,
        top_clusters=1,
    ),
    capacity=CapacityConfig(factor="0.7", group="sequence", below_one="drop_all"),
    expert=ExpertConfig(activation="gelu"),
    balance=BalanceConfig(),
)
SMALL = MoEConfig(**SIZES, expert=ExpertConfig(activation="identity", gated=False))
DECODER = DecoderConfig.grouped(
    vocab_size=11, model_dim=6, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=10, qk_norm="per_head",
    qkv_bias=True, moe=dataclasses.replace(SMALL, router=RouterConfig(renormalise="sum")), dense_layers=(),
    norm_eps=1e-3,
)
X = np.random.default_rng(3).normal(size=(2, 12, 6)).astype(np.float32)
TOKENS = np.random.default_rng(4).integers(0, 11, (2, 7))
# A single layer cannot distinguish pooled losses from their mean; without ties their rule has no effect.
UNSEEN = {"balance.pooled='over_layers'", "ties to the higher expert index"}
BEYOND = 1e-4  # what a convention changes is far above rounding: gelu and its tanh form are 2e-4 apart here


def moe(config: MoEConfig) -> Any:
    made = filled(lambda: jax_moe.MoE(config, rngs=nnx.Rngs(0)), seed=5)
    if config.router.correction_bias:  # below all scores: experts of an excluded cluster win if they count as 0
        made.router.correction_bias[...] = made.router.correction_bias[...] - 1.0
    return made


def decoder() -> Any:
    return filled(lambda: jax_moe.Decoder(DECODER, rngs=nnx.Rngs(0), param_dtype=jnp.float64), seed=5)


def planted(module: Any, *names: str, x: np.ndarray = X) -> Answer:
    """The answer of a side with these conventions planted."""
    plants = [convention for convention in conventions_of(module) if convention.name in names]
    assert len(plants) == len(names), names
    return our_answer(changed(module, *plants), jnp.asarray(x), {})


def overlooked(module: Any, x: np.ndarray, unseen: set[str], only: tuple[str, ...] = ("",)) -> list[str]:
    """Plants every convention whose name starts with a prefix of `only`; returns those not named alone."""
    wrong, candidates = [], [convention for convention in conventions_of(module) if convention.name.startswith(only)]
    for convention in candidates:
        tried = explain(module, planted(module, convention.name, x=x), x, pairs=False, candidates=candidates)
        named = {attempt.conventions for attempt in tried if attempt.matches}
        expected = {()} if convention.name in unseen else {(convention.name,)}
        configured = next(attempt.error for attempt in tried if not attempt.conventions)
        if named != expected or (convention.name not in unseen and configured < BEYOND):
            wrong.append(f"{convention.name}: {named}, as configured {configured:.1g}")
    return wrong


def test_every_convention_of_a_layer_is_named_alone() -> None:
    assert len(conventions_of(moe(LAYER))) > 30
    assert overlooked(moe(LAYER), X, UNSEEN) == []


def test_softmax_before_or_after_and_what_is_the_same_as_that() -> None:
    after = our_answer(
        moe(dataclasses.replace(SMALL, router=RouterConfig(order="select_then_softmax"))), jnp.asarray(X), {}
    )
    groups = ("router.order", "router.renormalise")
    only = [known for known in conventions_of(moe(SMALL)) if known.group.startswith(groups)]
    said = in_words(explain(moe(SMALL), after, X, candidates=only))
    # equal in mathematics too
    assert "router.order='select_then_softmax'" in said and "router.renormalise='sum'" in said
    assert said.startswith("matches if ") and "; as configured 0." in said


def test_ties_are_told_from_each_other() -> None:
    even = moe(SMALL)
    even.router.kernel[...] = 0 * even.router.kernel[...]
    theirs = planted(even, "ties to the higher expert index")
    tried = explain(even, theirs, X)
    assert [attempt.conventions for attempt in tried if attempt.matches] == [("ties to the higher expert index",)]


def test_rounding_does_not_decide_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conventions that are the same function here are named in the order of the list, whichever rounds less."""
    only = [c for c in conventions_of(moe(SMALL)) if c.name in ("router.renormalise='sum'", "router.renormalise='eps'")]
    theirs = planted(moe(SMALL), "router.renormalise='sum'")
    for less in (0, 1):
        rounding = iter([3e-7, 1e-7] if less else [1e-7, 3e-7])

        def rounded(ours: Answer, theirs: Answer, rounding: Iterator[float] = rounding) -> float:
            found = distance(ours, theirs)
            return found if found > 1e-5 else next(rounding)

        with monkeypatch.context() as patch:
            patch.setattr(search, "distance", rounded)
            tried = explain(moe(SMALL), theirs, X, candidates=only)
        assert [each.conventions[0] for each in tried[:2]] == [c.name for c in only]


def test_conventions_of_a_decoder_in_fp64() -> None:
    some = (
        "attention scaled by model", "rope rotates", "rope.kind='linear' with factor=4", "rope.theta=1e+06",
        "norm_eps=1e-05", "norm_eps=1e-06", "router.renormalise='none'",
    )
    with jax.enable_x64(True):
        assert overlooked(decoder(), TOKENS, set(), some) == []


def test_conventions_of_a_makemoe_model_include_its_scale_of_attention() -> None:
    config = jax_moe.MakeMoEConfig(vocab_size=11, block_size=7, model_dim=8, num_heads=2, num_layers=2, num_experts=4)
    model = filled(lambda: jax_moe.MakeMoE(config, rngs=nnx.Rngs(0)))
    only = [known for known in conventions_of(model) if known.name.startswith(("attention", "capacity.rounding"))]
    theirs = planted(model, "attention scaled by head_dim**-0.5", x=TOKENS)
    assert in_words(explain(model, theirs, TOKENS, candidates=only)).startswith(
        "matches if attention scaled by head_dim**-0.5 ("
    )


def test_a_pair_is_named_where_no_single_one_explains() -> None:
    layer, pair = moe(SMALL), ("router.renormalise='sum'", "down of the experts transposed")
    tried = explain(layer, planted(layer, *pair), X, candidates=[
        known for known in conventions_of(layer)
        if known.group in ("router.renormalise", "transposed", "expert.weight_on")
    ])
    assert set(tried[0].conventions) == set(pair) and tried[0].matches
    assert " and " in in_words(tried)


def test_what_nothing_explains_is_said_with_what_comes_nearest() -> None:
    layer = moe(SMALL)
    noise = np.random.default_rng(0).normal(size=X.shape)
    only = [known for known in conventions_of(layer) if known.group in ("router.renormalise", "expert.weight_on")]
    said = in_words(explain(layer, noise, X, candidates=only))
    assert said.startswith("no known convention and no pair of them explains it; nearest: ")
    assert in_words(explain(layer, our_answer(layer, jnp.asarray(X), {}), X)) == "matches as configured (error 0)"


def test_their_side_may_be_a_function_of_the_input_and_of_torch() -> None:
    torch_ref = pytest.importorskip("torch_ref", reason="the other side here is PyTorch: install the extra `test`")
    import torch

    layer = moe(dataclasses.replace(SMALL, expert=ExpertConfig()))
    config = dataclasses.replace(
        layer.config, router=RouterConfig(renormalise="sum"), balance=BalanceConfig(f_sums_to="k")
    )
    reference = torch_ref.MoE(config)
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in jax_moe.to_torch(layer).items()})

    def theirs(x: np.ndarray) -> Answer:
        y, stats = reference(torch.from_numpy(x))
        return Answer(y.detach().numpy(), stats.load_balance_loss.item())

    groups = ("router.renormalise", "balance.f_sums_to", "gate/up")
    only = [known for known in conventions_of(layer) if known.group in groups]
    tried = explain(layer, theirs, X, candidates=only)
    assert set(tried[0].conventions) == {"router.renormalise='sum'", "balance.f_sums_to='k'"}
    assert explain(layer, lambda x: reference(torch.from_numpy(x))[0], X, candidates=only)[0].conventions == (
        "router.renormalise='sum'",
    )


def test_traces_of_the_microscope_are_read() -> None:
    layer = moe(SMALL)
    theirs = planted(layer, "router.renormalise='sum'")
    trace = {Place("combined"): theirs.output, Place("balance_loss"): np.asarray(theirs.balance_loss)}
    assert explain_traces(layer, X, trace).startswith("matches if router.renormalise='sum' or if router")


def test_outputs_of_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"the output has shape \(2, 6\): must be \(2, 12, 6\)"):
        explain(moe(SMALL), np.zeros((2, 6)), X)


def test_a_value_that_is_not_finite_is_infinitely_far() -> None:
    assert distance(Answer(np.array([np.nan])), Answer(np.ones(1))) == np.inf
