"""The contract: exact capacities, and errors that name the field, the value and what is allowed. No framework needed.

Long because every field's bad values are here, a row each.
"""

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_moe.config.attention import AttentionConfig
from jax_moe.config.models import BlockConfig, MakeMoEConfig
from jax_moe.config.moe import (
    AroundConfig,
    BalanceConfig,
    CapacityConfig,
    ExpertConfig,
    MoEConfig,
    RouterConfig,
    SoftMoEConfig,
)

pytestmark = pytest.mark.usefixtures("unchecked")  # the contract's own errors are raised, as for users


def moe(num_experts: int = 8, top_k: int = 2, **rest: object) -> MoEConfig:
    return MoEConfig(model_dim=4, expert_dim=8, num_experts=num_experts, top_k=top_k, **rest)  # type: ignore[arg-type]


def slots(group_size: int, num_experts: int, top_k: int, factor: object, **rule: object) -> int:
    return moe(
        num_experts, top_k, capacity=CapacityConfig(factor=factor, **rule)  # type: ignore[arg-type]
    ).expert_capacity(group_size)


# --- capacity -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("group_size", "num_experts", "top_k", "factor", "rule", "want"),
    [
        (512, 8, 2, 1.0, {}, 128),  # the published run: 16 * 32 * 2 / 8
        (100, 1, 1, 0.29, {}, 29),  # int(100 * 0.29) is 28 in floats
        (100, 1, 1, "0.29", {}, 29),
        (100, 1, 1, Fraction(29, 100), {}, 29),
        (200, 4, 1, 1.1, {"rounding": "ceil"}, 55),  # math.ceil(200 / 4 * 1.1) is 56 in floats
        (3, 3, 2, 1.25, {}, 2),  # 2.5 down
        (3, 3, 2, 1.25, {"rounding": "ceil"}, 3),  # 2.5 up
        (3, 3, 2, 1.0, {"rounding": "ceil"}, 2),  # a whole number stays
        (64, 8, 2, 1.05, {"rounding": "ceil", "multiple": 4}, 20),  # 16.8 -> 17 -> 20
        (64, 8, 2, 1.0, {"multiple": 4}, 16),  # already a multiple
        (64, 8, 2, 0.1, {"minimum": 4}, 4),  # 1.6 -> 1 -> 4
        (64, 8, 2, 0.1, {"multiple": 3, "minimum": 4}, 4),  # 1.6 -> 1 -> 3, at least 4: the minimum is not rounded up
        (6, 2, 2, 1.25, {}, 6),  # 7.5 -> 7, but a group has six tokens
        (6, 2, 2, 1.25, {"clamp": False}, 7),
        (3, 8, 2, 1.0, {"minimum": 4}, 3),  # the clamp is applied last
        (3, 8, 2, 1.0, {"minimum": 4, "clamp": False}, 4),
        (64, 8, 2, 1.25, {"counts_top_k": False, "rounding": "ceil"}, 10),  # Switch: 64 / 8 * 1.25
        (64, 8, 2, 1.25, {}, 20),
        (64, 8, 2, Fraction(1, 3), {}, 5),  # 16/3
        (3, 8, 2, 1.0, {"below_one": "drop_all"}, 0),  # 0.75
        (1, 8, 2, 1e-9, {"below_one": "drop_all"}, 0),
        (10, 10, 1, 10**6, {}, 10),
    ],
)
def test_capacity(group_size: int, num_experts: int, top_k: int, factor: object, rule: dict, want: int) -> None:
    assert slots(group_size, num_experts, top_k, factor, **rule) == want


def test_floats_would_give_other_numbers() -> None:
    assert int(100 * 0.29) == 28 and math.ceil(200 / 4 * 1.1) == 56


def test_dropless_has_room_for_everybody() -> None:
    assert moe().expert_capacity(1000) == 1000


def test_below_one_slot_is_an_error_that_says_why() -> None:
    want = r"capacity factor=0\.5: must give at least one slot; "
    want += r"7 tokens, top_k=1, num_experts=8 give 0\.438 slots per expert"
    with pytest.raises(ValueError, match=f"^{want}$"):
        slots(7, 8, 1, 0.5)
    assert slots(7, 8, 1, 0.5, minimum=1) == 1
    assert slots(7, 8, 1, 0.5, rounding="ceil") == 1


FACTORS = st.decimals(min_value="0.001", max_value="9", places=3)
RULES = st.fixed_dictionaries({
    "rounding": st.sampled_from(["floor", "ceil"]), "multiple": st.integers(1, 9), "minimum": st.integers(0, 9),
    "clamp": st.booleans(), "counts_top_k": st.booleans(),
})


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 8), FACTORS, RULES)
def test_capacity_against_two_other_computations(
    group_size: int, num_experts: int, top_k: int, factor: Decimal, rule: dict
) -> None:
    top_k = min(top_k, num_experts)
    choices = group_size * top_k if rule["counts_top_k"] else group_size
    # in integers of thousandths, and in Decimal with the division last, the only operation that can round
    thousandths = choices * int(factor * 1000)
    by_integers = thousandths // (1000 * num_experts) + (
        rule["rounding"] == "ceil" and thousandths % (1000 * num_experts) > 0
    )
    whole, rest = divmod(Decimal(choices) * factor, Decimal(num_experts))
    by_decimal = int(whole) + (rule["rounding"] == "ceil" and rest > 0)
    assert by_integers == by_decimal
    want = by_integers
    while want % rule["multiple"]:
        want += 1
    want = max(want, rule["minimum"])
    if rule["clamp"]:
        want = min(want, group_size)
    for written in (float(factor), str(factor), Fraction(factor)):
        assert slots(group_size, num_experts, top_k, written, below_one="drop_all", **rule) == want
    if want == 0:
        with pytest.raises(ValueError, match="must give at least one slot"):
            slots(group_size, num_experts, top_k, str(factor), **rule)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 16), FACTORS, FACTORS)
def test_capacity_grows_with_the_factor(group_size: int, num_experts: int, first: Decimal, second: Decimal) -> None:
    low, high = sorted((first, second))
    assert slots(group_size, num_experts, 1, str(low), below_one="drop_all") <= slots(
        group_size, num_experts, 1, str(high), below_one="drop_all"
    )


def test_group_size() -> None:
    assert moe().group_size(4, 6) == 24
    assert moe(capacity=CapacityConfig()).group_size(4, 6) == 24
    assert moe(capacity=CapacityConfig(group="sequence")).group_size(4, 6) == 6
    assert moe(capacity=CapacityConfig(group="fixed", group_size=5)).group_size(4, 6) == 5


def test_with_capacity() -> None:
    dropless = moe()
    limited = dropless.with_capacity(1.5, priority="choice")
    assert dropless.capacity is None, "the contract itself does not change"
    assert limited.capacity == CapacityConfig(factor=1.5, priority="choice")
    assert limited.with_capacity("0.75").capacity == CapacityConfig(factor="0.75", priority="choice"), (
        "other settings stay"
    )
    assert limited.with_capacity(None) == dropless
    assert dataclasses.replace(limited, capacity=None) == dropless
    with pytest.raises(ValueError, match=r"^capacity_factor=None: must be a number when priority is set$"):
        dropless.with_capacity(None, priority="choice")
    with pytest.raises(TypeError, match="prioritty"):
        dropless.with_capacity(1.0, prioritty="choice")


@pytest.mark.parametrize("config", [
    RouterConfig(), CapacityConfig(), ExpertConfig(), BalanceConfig(), moe(), MakeMoEConfig(),
    SoftMoEConfig(model_dim=4, num_experts=2, num_slots=1), AttentionConfig(model_dim=4, num_heads=2),
    BlockConfig(attention=AttentionConfig(model_dim=4, num_heads=2), moe=moe()),
], ids=lambda config: type(config).__name__)
def test_frozen_and_hashable(config: object) -> None:
    first = dataclasses.fields(config)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, first, None)
    assert hash(config) == hash(dataclasses.replace(config))  # type: ignore[type-var]


# --- errors ---------------------------------------------------------------------------------------------------------
SIZES = {"model_dim": 4, "expert_dim": 8, "num_experts": 8, "top_k": 2}
SOFT = {"model_dim": 4, "num_experts": 2, "num_slots": 1}
HEADS = {"model_dim": 4, "num_heads": 2}
STATE, BY_TABLE = RouterConfig(network_dim=2, takes_state=True), RouterConfig(table_tokens=4)
CLUSTERS = RouterConfig(score="sigmoid", num_clusters=4, top_clusters=1)
KINDS = "'none', 'rms', 'rms_wide', 'rms_centered', 'rms_of_scaled'"  # of norms in a mixture
BAD = [
    (MoEConfig, {**SIZES, "identity_experts": -1}, "identity_experts=-1: must be an integer of at least 0"),
    (
        MoEConfig, {**SIZES, "identity_experts": 7},
        "identity_experts=7: must be at most 6: top_k=2 experts have weights",
    ),
    (
        MoEConfig, {**SIZES, "identity_experts": 1, "expert": ExpertConfig(dropout=0.1)},
        "dropout=0.1: must be 0 with identity_experts",
    ),
    (
        MoEConfig, {**SIZES, "identity_answer": "nothing"},
        "identity_answer='nothing': must be 'input' without identity_experts",
    ),
    (RouterConfig, {"learned_scale": 1}, "learned_scale=1: must be True or False"),
    (RouterConfig, {"network_dim": -1}, "network_dim=-1: must be an integer of at least 0"),
    (RouterConfig, {"network_norm_eps": 0.0}, "network_norm_eps=0.0: must be a number above 0"),
    (RouterConfig, {"takes_state": True}, "takes_state=True: must be False without a network (network_dim=0)"),
    (RouterConfig, {"network_dim": 2, "bias": True}, "bias=True: must be False with a network_dim"),
    (RouterConfig, {"network_dim": 2, "product_keys": "own"}, "product_keys='own': must be 'none' with a network_dim"),
    (RouterConfig, {"product_keys": "flat", "input_norm": True}, "input_norm=True: must be False with product_keys"),
    (
        RouterConfig, {"product_keys": "own", "noise": "learned_gaussian"},
        "noise='learned_gaussian': must be 'none' or 'input_jitter' with product_keys",
    ),
    (
        MoEConfig, {**SIZES, "router": RouterConfig(product_keys="own")},
        "num_experts=8: must be a square number with product_keys='own'",
    ),
    (ExpertConfig, {"shared_gated": True}, "shared_gated=True: must be 'same' without a shared expert (shared_dim=0)"),
    (ExpertConfig, {"shared_dim": 1, "shared_gated": 2}, "shared_gated=2: must be 'same', True or False"),
    (
        BlockConfig, {"attention": AttentionConfig(**HEADS), "moe": MoEConfig(**SIZES, router=STATE)},
        "takes_state=True: must be False in a block or decoder: it hands on no router's state",
    ),
    (
        BlockConfig, {"attention": AttentionConfig(**HEADS), "moe": MoEConfig(**SIZES, router=BY_TABLE)},
        "table_tokens=4: must be 0 in a block or decoder: it hands its mixtures no tokens",
    ),
    (RouterConfig, {"shared_experts": -1}, "shared_experts=-1: must be an integer of at least 0"),
    (
        RouterConfig, {"shared_experts": 1, "order": "select_then_softmax"},
        "order='select_then_softmax': must be 'score_then_select' with shared_experts",
    ),
    (
        RouterConfig, {"shared_experts": 1, "noise": "learned_gaussian"},
        "noise='learned_gaussian': must be 'none' or 'input_jitter' with shared_experts",
    ),
    (ExpertConfig, {"gate_softcap": 0.0}, "gate_softcap=0.0: must be None or a number above 0"),
    (ExpertConfig, {"up_softcap": 1.0, "gated": False}, "up_softcap=1.0: must be None unless gated"),
    (ExpertConfig, {"up_softcap": 1.0, "clamp": 1.0}, "up_softcap=1.0: must be None with a clamp"),
    (
        ExpertConfig, {"gate_softcap": 1.0, "activation": "gelu"},
        "activation='gelu': must be 'silu' with a gate_softcap",
    ),
    (
        MoEConfig, {**SIZES, "router": RouterConfig(shared_experts=1)},
        "shared_dim=0: must be above 0 with shared_experts",
    ),
    (
        MoEConfig,
        {**SIZES, "router": RouterConfig(shared_experts=1), "expert": ExpertConfig(shared_dim=1, shared_gate=True)},
        "shared_gate=True: must be False with shared_experts",
    ),
    (
        MoEConfig,
        {
            **SIZES, "router": RouterConfig(learned_scale=True),
            "capacity": CapacityConfig(renormalise_after_drop=True),
        },
        "renormalise_after_drop=True: must be False with shared_experts or a learned_scale",
    ),
    (RouterConfig, {"logit_scale": 0.0}, "logit_scale=0.0: must be a number above 0"),
    (
        ExpertConfig, {"answer_norm": "layer"},
        "answer_norm='layer': must be one of 'none', 'rms', 'rms_wide', 'rms_centered', 'rms_of_scaled'",
    ),
    (ExpertConfig, {"answer_norm_eps": 0.0}, "answer_norm_eps=0.0: must be a number above 0"),
    (AroundConfig, {"latent_dim": -1}, "latent_dim=-1: must be an integer of at least 0"),
    (AroundConfig, {"latent_norm": "rms"}, "latent_norm='rms': must be 'none' without a latent_dim"),
    (
        AroundConfig, {"output_norm": "layer"},
        "output_norm='layer': must be one of 'none', 'rms', 'rms_wide', 'rms_centered', 'rms_of_scaled'",
    ),
    (AroundConfig, {"output_norm_eps": 0.0}, "output_norm_eps=0.0: must be a number above 0"),
    (AroundConfig, {"norm_eps": 0.0}, "norm_eps=0.0: must be a number above 0"),
    *(
        (AroundConfig, {name: "layer"}, f"{name}='layer': must be one of {KINDS}")
        for name in ("input_norm", "routed_norm", "shared_input_norm", "shared_norm")
    ),
    *(
        (MoEConfig, {**SIZES, "around": AroundConfig(**{name: "rms"})},  # type: ignore[arg-type]
         f"{name}='rms': must be 'none' without a shared expert (shared_dim=0)")
        for name in ("shared_input_norm", "shared_norm")
    ),
    (RouterConfig, {"input_norm_eps": 0.0}, "input_norm_eps=0.0: must be a number above 0"),
    (RouterConfig, {"input_norm": 1}, "input_norm=1: must be True or False"),
    (RouterConfig, {"expert_scale": None}, "expert_scale=None: must be True or False"),
    (
        MoEConfig, {**SIZES, "router": RouterConfig(expert_scale=True),
                    "capacity": CapacityConfig(renormalise_after_drop=True)},
        "expert_scale=True: must be False when renormalise_after_drop=True",
    ),
    (
        MoEConfig, {**SIZES, "around": AroundConfig(latent_dim=3), "expert": ExpertConfig(dropout=0.1)},
        "dropout=0.1: must be 0 with a latent_dim",
    ),
    (RouterConfig, {"score": "softplus"}, "score='softplus': must be one of 'softmax', 'sigmoid', 'sqrt_softplus'"),
    (
        RouterConfig, {"order": "x"},
        "order='x': must be one of 'score_then_select', 'select_then_softmax', 'sparse_mixer'",
    ),
    (RouterConfig, {"renormalise": True}, "renormalise=True: must be one of 'none', 'sum', 'eps', 'floor'"),
    (RouterConfig, {"selection": "x"}, "selection='x': must be one of 'score', 'logit'"),
    (
        RouterConfig, {"selection": "logit", "num_clusters": 2, "top_clusters": 1},
        "num_clusters=2: must be 1 when selection='logit'",
    ),
    (ExpertConfig, {"clamp_on": "up"}, "clamp_on='up': must be one of 'gate', 'activation'"),
    (
        ExpertConfig, {"shared_dim": 1, "shared_clamp": 0},
        "shared_clamp=0: must be 'same', None or a number above 0",
    ),
    (ExpertConfig, {"shared_dim": 1, "shared_scale": 0.0}, "shared_scale=0.0: must be a number above 0"),
    (ExpertConfig, {"shared_clamp": None}, "shared_dim=0: must be above 0 for a shared expert's own clamp or scale"),
    (
        ExpertConfig, {"shared_dim": 1, "shared_clamp": 2.0, "gated": False},
        "shared_clamp=2.0: must be 'same' or None unless gated",
    ),
    (RouterConfig, {"cluster_score": "mean"}, "cluster_score='mean': must be one of 'max', 'top2_sum'"),
    (RouterConfig, {"cluster_fill": "nan"}, "cluster_fill='nan': must be one of 'neg_inf', 'zero'"),
    (RouterConfig, {"dtype": "bfloat16"}, "dtype='bfloat16': must be one of 'float32', 'input'"),
    (RouterConfig, {"weight_dtype": None}, "weight_dtype=None: must be one of 'float32', 'input'"),
    (
        RouterConfig, {"noise": "gaussian"},
        "noise='gaussian': must be one of 'none', 'learned_gaussian', 'input_jitter'",
    ),
    (RouterConfig, {"jitter_scope": "all"}, "jitter_scope='all': must be one of 'router', 'block'"),
    (RouterConfig, {"num_clusters": 0}, "num_clusters=0: must be an integer of at least 1"),
    (RouterConfig, {"top_clusters": 1.0}, "top_clusters=1.0: must be an integer of at least 1"),
    (RouterConfig, {"num_clusters": 2, "top_clusters": 3}, "top_clusters=3: must be at most num_clusters=2"),
    (RouterConfig, {"renormalise_eps": 0.0}, "renormalise_eps=0.0: must be a number above 0"),
    (RouterConfig, {"scale": -1.0}, "scale=-1.0: must be a number above 0"),
    (RouterConfig, {"scale": float("nan")}, "scale=nan: must be a number above 0"),
    (
        RouterConfig, {"noise": "input_jitter", "jitter_eps": 1.0},
        "jitter_eps=1.0: must be a number of at least 0 and below 1",
    ),
    (RouterConfig, {"noise": "input_jitter"}, "jitter_eps=0.0: must be above 0 exactly when noise='input_jitter'"),
    (RouterConfig, {"jitter_eps": 0.1}, "jitter_eps=0.1: must be above 0 exactly when noise='input_jitter'"),
    (
        RouterConfig, {"order": "select_then_softmax", "score": "sigmoid"},
        "score='sigmoid': must be 'softmax' when order='select_then_softmax'",
    ),
    (
        RouterConfig, {"order": "select_then_softmax", "correction_bias": True},
        "correction_bias=True: must be False when order='select_then_softmax'",
    ),
    (
        RouterConfig, {"order": "select_then_softmax", "num_clusters": 2},
        "num_clusters=2: must be 1 when order='select_then_softmax'",
    ),
    (
        RouterConfig, {"order": "sparse_mixer", "score": "sigmoid"},
        "score='sigmoid': must be 'softmax' when order='sparse_mixer'",
    ),
    (RouterConfig, {"mixer_eps": -0.1}, "mixer_eps=-0.1: must be a number of at least 0 and below 1"),
    (CapacityConfig, {"factor": 0}, "factor=0: must be a number above 0"),
    (CapacityConfig, {"factor": -1.5}, "factor=-1.5: must be a number above 0"),
    (CapacityConfig, {"factor": "much"}, "factor='much': must be a number above 0"),
    (CapacityConfig, {"factor": "1/0"}, "factor='1/0': must be a number above 0"),
    (CapacityConfig, {"factor": float("inf")}, "factor=inf: must be a number above 0"),
    (CapacityConfig, {"factor": float("nan")}, "factor=nan: must be a number above 0"),
    (CapacityConfig, {"factor": None}, "factor=None: must be a number above 0"),
    (CapacityConfig, {"rounding": "up"}, "rounding='up': must be one of 'floor', 'ceil'"),
    (CapacityConfig, {"multiple": 0}, "multiple=0: must be an integer of at least 1"),
    (CapacityConfig, {"multiple": True}, "multiple=True: must be an integer of at least 1"),
    (CapacityConfig, {"minimum": -1}, "minimum=-1: must be an integer of at least 0"),
    (CapacityConfig, {"group": "token"}, "group='token': must be one of 'batch', 'sequence', 'fixed'"),
    (CapacityConfig, {"group": "fixed"}, "group_size=None: must be set exactly when group='fixed'"),
    (CapacityConfig, {"group_size": 4}, "group_size=4: must be set exactly when group='fixed'"),
    (CapacityConfig, {"group": "fixed", "group_size": 0}, "group_size=0: must be an integer of at least 1"),
    (
        CapacityConfig, {"priority": "probs"},
        "priority='probs': must be one of 'token', 'choice', 'probability', 'batch'",
    ),
    (CapacityConfig, {"below_one": "warn"}, "below_one='warn': must be one of 'error', 'drop_all'"),
    (
        ExpertConfig, {"activation": "swish"},
        "activation='swish': must be one of 'relu', 'relu2', 'silu', 'gelu', 'gelu_tanh', 'quick_gelu', 'identity'",
    ),
    (ExpertConfig, {"dropout": 1.0}, "dropout=1.0: must be a number of at least 0 and below 1"),
    (ExpertConfig, {"dropout": -0.1}, "dropout=-0.1: must be a number of at least 0 and below 1"),
    (ExpertConfig, {"clamp": 0.0}, "clamp=0.0: must be None or a number above 0"),
    (ExpertConfig, {"clamp": 7.0, "gated": False}, "clamp=7.0: must be None unless gated"),
    (ExpertConfig, {"up_offset": 1.0, "gated": False}, "up_offset=1.0: must be 0 unless gated"),
    (ExpertConfig, {"weight_on": "both"}, "weight_on='both': must be one of 'output', 'input'"),
    (ExpertConfig, {"shared_dim": -1}, "shared_dim=-1: must be an integer of at least 0"),
    (ExpertConfig, {"shared_gate": True}, "shared_gate=True: must be False without a shared expert (shared_dim=0)"),
    (BalanceConfig, {"of": "tokens"}, "of='tokens': must be one of 'choices', 'scores', 'logits'"),
    (BalanceConfig, {"f_sums_to": "two"}, "f_sums_to='two': must be one of 'one', 'k'"),
    (BalanceConfig, {"pooled": "both"}, "pooled='both': must be one of 'per_layer', 'over_layers'"),
    (MoEConfig, {**SIZES, "model_dim": 0}, "model_dim=0: must be an integer of at least 1"),
    (MoEConfig, {**SIZES, "expert_dim": 2.5}, "expert_dim=2.5: must be an integer of at least 1"),
    (MoEConfig, {**SIZES, "num_experts": "8"}, "num_experts='8': must be an integer of at least 1"),
    (MoEConfig, {**SIZES, "top_k": 9}, "top_k=9: must be at most num_experts=8"),
    (
        MoEConfig, {**SIZES, "router": RouterConfig(score="sigmoid", num_clusters=3)},
        "num_clusters=3: must be a divisor of num_experts=8",
    ),
    (MoEConfig, {**SIZES, "top_k": 3, "router": CLUSTERS}, "top_k=3: must be at most 2, the experts in top_clusters=1"),
    (
        MoEConfig, {**SIZES, "top_k": 1, "router": RouterConfig(num_clusters=8, top_clusters=2)},
        "cluster_score='top2_sum': must be 'max' when a cluster holds one expert",
    ),
    (
        MoEConfig, {**SIZES, "dispatcher": "fast"},
        "dispatcher='fast': must be one of 'auto', 'einsum', 'gather', 'grouped', 'ragged', 'blocks', 'chosen'",
    ),
    (SoftMoEConfig, {**SOFT, "num_slots": 0}, "num_slots=0: must be an integer of at least 1"),
    (SoftMoEConfig, {**SOFT, "hidden_dims": (4, 0)}, "hidden_dims=(4, 0): must be integers of at least 1"),
    (
        SoftMoEConfig, {**SOFT, "hidden_activation": "tanh"},
        "hidden_activation='tanh': must be one of 'relu', 'relu2', 'silu', 'gelu', 'gelu_tanh', 'quick_gelu', "
        "'identity'",
    ),
    (
        SoftMoEConfig, {**SOFT, "output_activation": ""},
        "output_activation='': must be one of 'relu', 'relu2', 'silu', 'gelu', 'gelu_tanh', 'quick_gelu', 'identity'",
    ),
    (AttentionConfig, {"model_dim": 128, "num_heads": 7}, "num_heads=7: must be a divisor of model_dim=128"),
    (AttentionConfig, {**HEADS, "projections": "qkv"}, "projections='qkv': must be one of 'per_head', 'fused'"),
    (AttentionConfig, {**HEADS, "scale": "sqrt"}, "scale='sqrt': must be one of 'head_dim', 'model_dim'"),
    (AttentionConfig, {**HEADS, "dropout": 2.0}, "dropout=2.0: must be a number of at least 0 and below 1"),
    (
        BlockConfig, {"attention": AttentionConfig(model_dim=8, num_heads=2), "moe": moe()},
        "model_dim=4: must be the attention's model_dim=8",
    ),
    (
        BlockConfig, {"attention": AttentionConfig(**HEADS), "moe": SoftMoEConfig(**SOFT)},
        "moe='SoftMoEConfig': must be a MoEConfig in a causal block: Soft MoE mixes every position into every other",
    ),
    (MakeMoEConfig, {"vocab_size": 0}, "vocab_size=0: must be an integer of at least 1"),
    (MakeMoEConfig, {"block_size": -1}, "block_size=-1: must be an integer of at least 1"),
    (MakeMoEConfig, {"num_layers": 0}, "num_layers=0: must be an integer of at least 1"),
    (MakeMoEConfig, {"num_heads": 7}, "num_heads=7: must be a divisor of model_dim=128"),
    (MakeMoEConfig, {"top_k": 9}, "top_k=9: must be at most num_experts=8"),
    (MakeMoEConfig, {"dropout": 1.5}, "dropout=1.5: must be a number of at least 0 and below 1"),
    (MakeMoEConfig, {"capacity_factor": 0.0}, "factor=0.0: must be a number above 0"),
]


@pytest.mark.parametrize(
    ("config", "arguments", "message"), BAD, ids=[f"{case[0].__name__}, {case[2]}" for case in BAD]
)
def test_bad_settings_are_named(config: type, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(("config", "arguments", "when"), [
    (MoEConfig, {**SIZES, "dispatcher": "gather"}, "without a capacity"),
    (MoEConfig, {**SIZES, "dispatcher": "grouped", "capacity": CapacityConfig()}, "with a capacity"),
    (MakeMoEConfig, {"dispatcher": "grouped"}, "with a capacity"),
    (MakeMoEConfig, {"dispatcher": "gather", "capacity_factor": None}, "without a capacity"),
])
def test_a_dispatcher_that_cannot_serve_the_capacity_is_refused(config: type, arguments: dict, when: str) -> None:
    with pytest.raises(ValueError, match=rf"^dispatcher='{arguments['dispatcher']}': must be .* {when}$"):
        config(**arguments)


def test_every_contract_has_a_bad_setting_here() -> None:
    every = {
        RouterConfig, CapacityConfig, ExpertConfig, AroundConfig, BalanceConfig, MoEConfig, SoftMoEConfig,
        AttentionConfig, BlockConfig,
    }
    assert {case[0] for case in BAD} == every | {MakeMoEConfig}


def test_unknown_and_positional_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="num_expert"):
        MoEConfig(**{**SIZES, "num_expert": 8})
    with pytest.raises(TypeError, match="positional"):
        RouterConfig("softmax")  # type: ignore[misc]


# Values of types that the annotations do not allow, as from a configuration file or a command line
WRONG_TYPES = [
    (RouterConfig, {"scale": "2.5"}, "scale='2.5'"),
    (RouterConfig, {"renormalise_eps": None}, "renormalise_eps=None"),
    (RouterConfig, {"noise": "input_jitter", "jitter_eps": "0.1"}, "jitter_eps='0.1'"),
    (ExpertConfig, {"dropout": "0.1"}, "dropout='0.1'"),
    (ExpertConfig, {"clamp": "7"}, "clamp='7'"),
    (ExpertConfig, {"dropout": None}, "dropout=None"),
    (SoftMoEConfig, {**SOFT, "hidden_dims": 16}, "hidden_dims=16"),
    (AttentionConfig, {**HEADS, "dropout": None}, "dropout=None"),
    (MakeMoEConfig, {"dropout": "0.1"}, "dropout='0.1'"),
]


@pytest.mark.parametrize(
    ("config", "arguments", "named"), WRONG_TYPES, ids=[f"{o[0].__name__}, {o[2]}" for o in WRONG_TYPES]
)
def test_wrong_types_are_named_too(config: type, arguments: dict, named: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(**arguments)
    assert str(caught.value).startswith(f"{named}: must be ")


def test_hidden_dims_default_to_one_layer_of_the_models_width() -> None:
    assert SoftMoEConfig(**SOFT).widths == (4, 4, 4)
    assert SoftMoEConfig(**SOFT, hidden_dims=()).widths == (4, 4)
    assert SoftMoEConfig(**SOFT, hidden_dims=[6, 7]).widths == (4, 6, 7, 4)  # type: ignore[arg-type]


def test_attention_scales() -> None:
    assert AttentionConfig(model_dim=64, num_heads=4).score_scale == 0.25
    assert AttentionConfig(model_dim=64, num_heads=4, scale="model_dim").score_scale == 0.125
