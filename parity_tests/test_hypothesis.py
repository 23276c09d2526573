"""Contracts beyond the table: Hypothesis draws any legal one and both sides must agree, choices exactly, in fp64.

Derandomised, so a run says the same everywhere; `--hypothesis-profile=search` looks further. A failure is shrunk and
printed as the smallest contract that shows it.
"""

import dataclasses
import functools
from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="drawn contracts are compared with PyTorch: install the extra `test`")

from hypothesis import assume, given, note
from hypothesis import strategies as st

from jax_moe.config import (
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    ExpertConfig,
    MoEConfig,
    RouterConfig,
    SoftMoEConfig,
)
from parity_tests.cases import Case, Draw, Mask
from parity_tests.checks import COLUMN, Runs

CHECKED = ("experts and slots", "forward", "statistics", "input gradient", "parameter gradients", "loss gradients")
ACTIVATIONS = st.sampled_from(["relu", "silu", "gelu", "gelu_tanh", "quick_gelu", "identity"])


@st.composite
def routers(draw: st.DrawFn) -> RouterConfig:
    """Any router but its clusters, which need to know E."""
    after = draw(st.booleans())
    noise = draw(st.sampled_from(["none", "learned_gaussian", "input_jitter"]))
    return RouterConfig(
        order="select_then_softmax" if after else "score_then_select",
        score="softmax" if after else draw(st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"])),
        renormalise=draw(st.sampled_from(["none", "sum", "eps"])),
        renormalise_eps=draw(st.sampled_from([1e-20, 1e-3])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        bias=draw(st.booleans()),
        correction_bias=not after and draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "input"])),
        noise=noise,
        jitter_eps=0.1 if noise == "input_jitter" else 0.0,
        jitter_scope=draw(st.sampled_from(["router", "block"])),
    )


@st.composite
def experts(draw: st.DrawFn) -> ExpertConfig:
    """Any expert, with or without a shared one."""
    gated, shared = draw(st.booleans()), draw(st.sampled_from([0, 3]))
    return ExpertConfig(
        activation=draw(ACTIVATIONS),
        gated=gated,
        bias=draw(st.booleans()),
        clamp=draw(st.sampled_from([None, 0.5])) if gated else None,
        up_offset=draw(st.sampled_from([0.0, 1.0])) if gated else 0.0,
        weight_on=draw(st.sampled_from(["output", "input"])),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        shared_dim=shared,
        shared_gate=shared > 0 and draw(st.booleans()),
    )


@st.composite
def capacities(draw: st.DrawFn) -> CapacityConfig:
    """Any capacity rule; one that leaves no slot drops everything."""
    group = draw(st.sampled_from(["batch", "sequence", "fixed"]))
    return CapacityConfig(
        factor=draw(st.sampled_from([1.0, 0.5, "0.29", 2.0])),
        rounding=draw(st.sampled_from(["floor", "ceil"])),
        multiple=draw(st.sampled_from([1, 3])),
        minimum=draw(st.sampled_from([0, 2])),
        clamp=draw(st.booleans()),
        counts_top_k=draw(st.booleans()),
        group=group,
        group_size=draw(st.integers(1, 8)) if group == "fixed" else None,
        priority=draw(st.sampled_from(["token", "choice", "probability"])),
        renormalise_after_drop=draw(st.booleans()),
        below_one="drop_all",
    )


@st.composite
def moe_configs(draw: st.DrawFn) -> MoEConfig:
    """Any contract of a sparse layer."""
    num_experts = draw(st.integers(1, 6))
    capacity = draw(st.none() | capacities())
    config = MoEConfig(
        model_dim=draw(st.integers(1, 4)),
        expert_dim=draw(st.integers(1, 4)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        router=draw(routers()),
        capacity=capacity,
        expert=draw(experts()),
        balance=draw(st.builds(BalanceConfig, f_sums_to=st.sampled_from(["one", "k"]))),
        dispatcher=draw(st.sampled_from(["einsum", "grouped" if capacity is None else "gather"])),
    )
    if config.router.order == "score_then_select" and num_experts in (4, 6) and draw(st.booleans()):
        clustered = dataclasses.replace(
            config.router, num_clusters=2, top_clusters=draw(st.integers(1, 2)),
            cluster_score=draw(st.sampled_from(["max", "top2_sum"])), cluster_fill=draw(st.sampled_from(["neg_inf", "zero"])),
        )
        assume(config.top_k <= clustered.top_clusters * num_experts // 2)
        config = dataclasses.replace(config, router=clustered)
    return config


@st.composite
def moe_cases(draw: st.DrawFn) -> Case:
    """A contract, the input's sizes, the seed of its numbers, and which draws are given."""
    config = draw(moe_configs())
    draws = {"none": (), "learned_gaussian": ("noise",), "input_jitter": ("jitter",)}[config.router.noise]
    keep = ("keep",) if config.expert.dropout else ()
    mask = draw(st.sampled_from([None, "ragged", "row", "all"]))
    return Case(
        f"drawn {draw(st.integers(0, 99))}", config, batch_size=draw(st.integers(1, 3)), num_positions=draw(st.integers(1, 5)),
        draws=(*draws, *keep, *(("mask",) if mask else ())), mask=mask or "ragged", margin=0.0,
    )


@st.composite
def dense_layers(draw: st.DrawFn) -> Callable[[], SoftMoEConfig | AttentionConfig]:
    """Soft MoE or attention; made by the test, since the check of a tuple's type draws from `random`."""
    if draw(st.booleans()):
        return functools.partial(
            SoftMoEConfig, model_dim=draw(st.integers(2, 4)),
            num_experts=draw(st.integers(1, 3)), num_slots=draw(st.integers(1, 3)),
            hidden_dims=draw(st.none() | st.lists(st.integers(2, 5), max_size=3).map(tuple)),
            hidden_activation=draw(ACTIVATIONS), output_activation=draw(ACTIVATIONS), layer_norm=draw(st.booleans()),
            output_layer_norm=draw(st.booleans()), residual=draw(st.booleans()),
        )
    heads = draw(st.integers(1, 3))
    return functools.partial(
        AttentionConfig, model_dim=heads * draw(st.integers(1, 3)), num_heads=heads, causal=draw(st.booleans()),
        projections=draw(st.sampled_from(["per_head", "fused"])), scale=draw(st.sampled_from(["head_dim", "model_dim"])),
    )


def check(case: Case) -> None:
    """Raises MismatchError where the two sides differ."""
    note(repr(case))
    runs = Runs(case)
    for name in CHECKED:
        if COLUMN[name].inapplicable(case) is None:
            COLUMN[name].measure(runs, COLUMN[name].limit)


@given(moe_cases())
def test_any_sparse_layer(case: Case) -> None:
    check(case)


@given(dense_layers(), st.integers(1, 3), st.integers(1, 5), st.sampled_from([None, "ragged", "row", "all"]), st.integers(0, 99))
def test_any_soft_layer_or_attention(
    config: Callable[[], SoftMoEConfig | AttentionConfig], batch_size: int, num_positions: int, mask: Mask | None, seed: int
) -> None:
    draws: tuple[Draw, ...] = ("mask",) if mask else ()
    check(Case(f"drawn {seed}", config(), batch_size, num_positions, draws, mask or "ragged"))
