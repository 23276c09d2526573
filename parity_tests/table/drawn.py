"""Strategies for any legal contract, and a contract printed as the code that makes it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, get_args

from hypothesis import strategies as st

from jax_moe.config.attention import AttentionConfig
from jax_moe.config.models import BlockConfig
from jax_moe.config.moe import (
    Activation,
    BalanceConfig,
    CapacityConfig,
    ClusterFill,
    ClusterScore,
    ExpertConfig,
    MoEConfig,
    Noise,
    Order,
    Priority,
    Renormalise,
    RouterConfig,
    Score,
    SoftMoEConfig,
)
from parity_tests.table.cases import Case, Draw

# The layer norm of two numbers is +-1, and a gradient through it is rounding error: it cannot be compared.
LEAST_NORMED = 3
DROPLESS, DROPPING = ["auto", "einsum", "grouped", "ragged", "blocks", "chosen"], ["auto", "einsum", "gather"]
MOST_EXPERTS, MOST_WIDTH, MOST_SEQUENCES, MOST_POSITIONS = 8, 5, 3, 6


def one_of(literal: Any) -> st.SearchStrategy:
    """Any value of a Literal; the first is the simplest."""
    return st.sampled_from(get_args(literal))


@st.composite
def routers(draw: st.DrawFn, num_experts: int) -> RouterConfig:
    """Any router contract for E experts."""
    order = draw(one_of(Order))
    after = order != "score_then_select"
    noise = draw(one_of(Noise))
    router = RouterConfig(
        order=order,
        mixer_eps=draw(st.sampled_from([0.01, 0.3])),
        score="softmax" if after else draw(one_of(Score)),
        renormalise=draw(one_of(Renormalise)),
        renormalise_eps=draw(st.sampled_from([1e-20, 1e-3])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        bias=draw(st.booleans()),
        correction_bias=not after and draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "input"])),
        weight_dtype=draw(st.sampled_from(["float32", "input"])),
        noise=noise,
        noise_at_evaluation=draw(st.booleans()),
        jitter_eps=0.1 if noise == "input_jitter" else 0.0,
        jitter_scope=draw(st.sampled_from(["router", "block"])),
    )
    divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    clusters = 1 if after else draw(st.sampled_from(divisors))
    return dataclasses.replace(
        router, num_clusters=clusters, top_clusters=draw(st.integers(1, clusters)),
        cluster_score=draw(one_of(ClusterScore)) if num_experts > clusters else "max",
        cluster_fill=draw(one_of(ClusterFill)),
    )


@st.composite
def experts(draw: st.DrawFn) -> ExpertConfig:
    """Any expert contract, with or without a shared expert."""
    gated, shared, activation = draw(st.booleans()), draw(st.sampled_from([0, 3])), draw(one_of(Activation))
    clamp = draw(st.sampled_from([None, 0.5])) if gated else None
    soft = st.sampled_from([None, 0.8]) if gated and clamp is None else st.none()
    return ExpertConfig(
        activation=activation,
        gated=gated,
        bias=draw(st.booleans()),
        clamp=clamp,
        gate_softcap=draw(soft) if activation == "silu" else None,
        up_softcap=draw(soft),
        up_offset=draw(st.sampled_from([0.0, 1.0])) if gated else 0.0,
        weight_on=draw(st.sampled_from(["output", "input"])),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        shared_dim=shared,
        shared_gate=shared > 0 and draw(st.booleans()),
    )


@st.composite
def capacities(draw: st.DrawFn) -> CapacityConfig:
    """Any capacity contract; below one slot it drops everything."""
    group = draw(st.sampled_from(["batch", "sequence", "fixed"]))
    return CapacityConfig(
        factor=draw(st.sampled_from([1.0, 0.5, "0.29", 2.0, Fraction(2, 3)])),
        rounding=draw(st.sampled_from(["floor", "ceil"])),
        multiple=draw(st.integers(1, 4)),
        minimum=draw(st.integers(0, 3)),
        clamp=draw(st.booleans()),
        slots=draw(st.none() | st.integers(1, 4)),
        counts_top_k=draw(st.booleans()),
        group=group,
        group_size=draw(st.integers(1, 8)) if group == "fixed" else None,
        priority=draw(one_of(Priority)),
        renormalise_after_drop=draw(st.booleans()),
        below_one="drop_all",
    )


@st.composite
def balances(draw: st.DrawFn) -> BalanceConfig:
    """Any balance loss."""
    pooled = draw(st.sampled_from(["per_layer", "over_layers"]))
    counted = "batch" if pooled == "over_layers" else draw(st.sampled_from(["batch", "group", "sequence"]))
    return BalanceConfig(
        f_sums_to=draw(st.sampled_from(["one", "k"])), pooled=pooled, counted_in=counted,
        of=draw(st.sampled_from(["choices", "scores", "logits"])),
    )


@st.composite
def maps(draw: st.DrawFn, num_experts: int) -> dict[str, Any]:
    """What a router has in the place of one linear map, most often nothing."""
    width = draw(st.sampled_from([0, 0, 0, 3]))
    if width:
        return {"network_dim": width, "takes_state": draw(st.booleans()), "bias": False}
    if math.isqrt(num_experts) ** 2 == num_experts and draw(st.booleans()):
        return {"product_keys": "own", "bias": False}
    return {}


@st.composite
def moe_configs(draw: st.DrawFn) -> MoEConfig:
    """Any contract of a sparse layer."""
    num_experts = draw(st.integers(1, MOST_EXPERTS))
    router = draw(routers(num_experts))
    capacity, expert = draw(st.none() | capacities()), draw(experts())
    top_k = draw(st.integers(1, router.top_clusters * num_experts // router.num_clusters))
    identity = 0 if expert.dropout else draw(st.integers(0, num_experts - top_k))
    renormalised = capacity is not None and capacity.renormalise_after_drop
    weighed = router.order == "score_then_select" and router.noise != "learned_gaussian" and not renormalised
    if weighed and expert.shared_dim and not expert.shared_gate:
        router = dataclasses.replace(router, shared_experts=draw(st.integers(0, 2)))
    if router.noise != "learned_gaussian" and not router.shared_experts:
        router = dataclasses.replace(router, **draw(maps(num_experts)))
    return MoEConfig(
        model_dim=draw(st.integers(1, MOST_WIDTH)),
        expert_dim=draw(st.integers(1, MOST_WIDTH)),
        num_experts=num_experts,
        top_k=top_k,
        identity_experts=identity,
        identity_answer=draw(st.sampled_from(["input", "nothing"])) if identity else "input",
        router=router,
        capacity=capacity,
        expert=expert,
        answer_bias=draw(st.booleans()),
        balance=draw(balances()),
        dispatcher=draw(st.sampled_from(DROPLESS if capacity is None else DROPPING)),
    )


@st.composite
def moe_cases(draw: st.DrawFn) -> Case:
    """A contract, the input's sizes, the seed of its numbers, and which draws are given.

    Without draws the call is an evaluation without noise, unless the contract keeps noise on at evaluation.
    """
    config = draw(moe_configs())
    given: list[Draw] = []
    mask, logits = None, "free"
    if config.router.noise_at_evaluation or draw(st.booleans()):
        noise = draw(st.booleans()) or config.router.noise == "learned_gaussian"
        given += ["noise"] if noise else []
        given += ["jitter"] if config.router.noise == "input_jitter" else []
        given += ["keep"] if config.expert.dropout else []
        given += ["replay"] if draw(st.booleans()) else []
        mask = draw(st.sampled_from([None, "ragged", "row", "all"]))
        given += ["mask"] if mask else []
        by_weight = config.capacity is not None and config.capacity.priority in ("probability", "batch")
        # weights of two tokens that differ only by rounding could be ordered differently on both sides
        logits = draw(
            st.sampled_from(["free", "unchosen", "one", "two", *([] if by_weight else ["equal", "bfloat16"])])
        )
    return Case(
        f"drawn {draw(st.integers(0, 99))}", config, draw(st.integers(1, MOST_SEQUENCES)),
        draw(st.integers(1, MOST_POSITIONS)), tuple(given), mask or "ragged", logits, margin=0.0,
    )


@st.composite
def attentions(draw: st.DrawFn) -> AttentionConfig:
    """Any attention without dropout."""
    heads = draw(st.integers(1, 3))
    return AttentionConfig(
        model_dim=heads * draw(st.integers(LEAST_NORMED, 4)), num_heads=heads, causal=draw(st.booleans()),
        projections=draw(st.sampled_from(["per_head", "fused"])),
        scale=draw(st.sampled_from(["head_dim", "model_dim"])),
    )


@st.composite
def soft_layers(draw: st.DrawFn) -> Callable[[], SoftMoEConfig]:
    """A maker of Soft MoE contracts; the test calls it, since the check of a tuple's type draws from `random`."""
    return functools.partial(
        SoftMoEConfig, model_dim=draw(st.integers(LEAST_NORMED, 5)),
        num_experts=draw(st.integers(1, 3)), num_slots=draw(st.integers(1, 3)),
        hidden_dims=draw(st.none() | st.lists(st.integers(LEAST_NORMED, 5), max_size=3).map(tuple)),
        hidden_activation=draw(one_of(Activation)), output_activation=draw(one_of(Activation)),
        layer_norm=draw(st.booleans()), output_layer_norm=draw(st.booleans()), residual=draw(st.booleans()),
    )


@st.composite
def blocks(draw: st.DrawFn) -> BlockConfig:
    """Attention and any sparse layer without random draws, which a block takes in packed form."""
    attention, moe = draw(attentions()), draw(moe_configs())
    router = dataclasses.replace(moe.router, noise="none", jitter_eps=0.0, noise_at_evaluation=False)
    expert = dataclasses.replace(moe.expert, dropout=0.0)
    moe = dataclasses.replace(moe, model_dim=attention.model_dim, router=router, expert=expert)
    return BlockConfig(attention=attention, moe=moe, norm_eps=draw(st.sampled_from([1e-5, 1e-3])))


def as_code(value: object) -> str:
    """The expression that makes a contract or a case, without default values."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    parts = []
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING or held != default:
            parts.append(f"{field.name}={as_code(held)}")
    return f"{type(value).__name__}({', '.join(parts)})"
