"""Every preset against its source: sizes and switches as the papers and Hugging Face's code have them."""

import dataclasses
from inspect import isfunction

import pytest

from jax_moe import presets
from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import BalanceConfig, CapacityConfig, ExpertConfig, MoEConfig, RouterConfig

# Written from the publications and from reading the modelling code, field by field: sizes (model, expert, experts,
# chosen), then every switch that differs from the plainest layer (softmax over all, chosen as they are, plain SwiGLU)
SIZES = {
    "makemoe": (128, 512, 8, 2),
    "mixtral": (4096, 14336, 8, 2),
    "switch": (768, 3072, 8, 1),
    "vmoe": (768, 3072, 8, 2),
    "qwen2_moe": (2048, 1408, 60, 4),
    "qwen3_moe": (2048, 768, 128, 8),
    "olmoe": (2048, 1024, 64, 8),
    "deepseek_v3": (7168, 2048, 256, 8),
    "glm4_moe": (4096, 1408, 128, 8),
    "gpt_oss": (2880, 2880, 32, 4),
    "granite_moe": (1536, 512, 40, 8),
}
# score, where the softmax stands, renormalised, times, router bias, correction bias, clusters, of which kept
ROUTERS = {
    "makemoe": ("softmax", "select_then_softmax", "none", 1.0, True, False, 1, 1),
    "mixtral": ("softmax", "score_then_select", "sum", 1.0, False, False, 1, 1),
    "switch": ("softmax", "score_then_select", "none", 1.0, False, False, 1, 1),
    "vmoe": ("softmax", "score_then_select", "none", 1.0, False, False, 1, 1),
    "qwen2_moe": ("softmax", "score_then_select", "none", 1.0, False, False, 1, 1),
    "qwen3_moe": ("softmax", "score_then_select", "sum", 1.0, False, False, 1, 1),
    "olmoe": ("softmax", "score_then_select", "none", 1.0, False, False, 1, 1),
    "deepseek_v3": ("sigmoid", "score_then_select", "eps", 2.5, False, True, 8, 4),
    "glm4_moe": ("sigmoid", "score_then_select", "eps", 1.0, False, True, 1, 1),
    "gpt_oss": ("softmax", "select_then_softmax", "none", 1.0, True, False, 1, 1),
    "granite_moe": ("softmax", "select_then_softmax", "none", 1.0, False, False, 1, 1),
}
# activation, gated, biases, shared width, shared gate
EXPERTS = {
    "makemoe": ("relu", False, True, 0, False),
    "mixtral": ("silu", True, False, 0, False),
    "switch": ("relu", False, False, 0, False),
    "vmoe": ("gelu_tanh", False, True, 0, False),
    "qwen2_moe": ("silu", True, False, 5632, True),
    "qwen3_moe": ("silu", True, False, 0, False),
    "olmoe": ("silu", True, False, 0, False),
    "deepseek_v3": ("silu", True, False, 2048, False),
    "glm4_moe": ("silu", True, False, 1408, False),
    "gpt_oss": ("quick_gelu", True, True, 0, False),
    "granite_moe": ("silu", True, False, 0, False),
}
# dtype of the router's product and of the weights: fp32 kept, or the model's own
DTYPES = {
    "makemoe": ("float32", "float32"),
    "mixtral": ("input", "float32"),  # logits in the model's dtype, weights stay fp32 until they have multiplied
    "switch": ("float32", "input"),  # fp32 inside the router, rounded at its end: "selective precision"
    "vmoe": ("float32", "float32"),
    "qwen2_moe": ("input", "input"),  # weights are cast to the logits' dtype first
    "qwen3_moe": ("input", "input"),
    "olmoe": ("input", "input"),
    "deepseek_v3": ("float32", "float32"),  # Hugging Face's: fp32 throughout, experts as Mixtral's
    "glm4_moe": ("float32", "float32"),
    "gpt_oss": ("input", "input"),
    "granite_moe": ("input", "input"),
}
CAPACITIES = {  # all others are dropless
    "makemoe": CapacityConfig(
        factor=1.0, rounding="floor", multiple=1, minimum=0, counts_top_k=True, group="batch", priority="token",
        renormalise_after_drop=False, below_one="drop_all",
    ),
    "switch": CapacityConfig(factor=1.25, rounding="ceil", counts_top_k=False, group="sequence", priority="token"),
    "vmoe": CapacityConfig(
        factor=1.05, rounding="ceil", multiple=4, counts_top_k=True, group="sequence", priority="choice"
    ),
}
HUGGING_FACE_BALANCE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granite_moe")


def test_every_preset_is_here() -> None:
    for table in (SIZES, ROUTERS, EXPERTS, DTYPES):
        assert set(table) == set(presets.__all__)
    homes = (presets.__name__, MoEConfig.__module__)
    functions = {name for name, value in vars(presets).items() if isfunction(value) and value.__module__ in homes}
    assert functions == set(presets.__all__)


@pytest.mark.parametrize("name", presets.__all__)
def test_preset(name: str) -> None:
    config = getattr(presets, name)()
    assert isinstance(config, MoEConfig)
    router, expert = config.router, config.expert
    assert (config.model_dim, config.expert_dim, config.num_experts, config.top_k) == SIZES[name]
    assert ROUTERS[name] == (
        router.score, router.order, router.renormalise, router.scale, router.bias, router.correction_bias,
        router.num_clusters, router.top_clusters,
    )
    assert (expert.activation, expert.gated, expert.bias, expert.shared_dim, expert.shared_gate) == EXPERTS[name]
    assert (router.dtype, router.weight_dtype) == DTYPES[name]
    assert config.capacity == CAPACITIES.get(name)
    assert expert.weight_on == "output", "only Llama 4 weighs the input"
    pooled = name in HUGGING_FACE_BALANCE
    assert config.balance == (BalanceConfig(f_sums_to="k", pooled="over_layers") if pooled else BalanceConfig())
    if name == "gpt_oss":
        assert (expert.clamp, expert.up_offset) == (7.0, 1.0)
    else:
        assert (expert.clamp, expert.up_offset) == (None, 0.0)


def test_noise() -> None:
    quiet = {"none"}
    for name in set(presets.__all__) - {"makemoe", "switch"}:
        assert {getattr(presets, name)().router.noise} == quiet
    noisy = presets.makemoe().router
    assert noisy.noise == "learned_gaussian" and noisy.noise_at_evaluation, "makeMoE's noise is always on"
    assert presets.makemoe(noise=False).router.noise == "none"
    jitter = presets.switch().router
    assert (jitter.noise, jitter.jitter_eps, jitter.jitter_scope) == ("input_jitter", 0.01, "router"), (
        "seen by the router only"
    )
    assert not jitter.noise_at_evaluation, "Switch jitters in training only"
    block = presets.mixtral(jitter_eps=0.1).router
    assert (block.noise, block.jitter_scope) == ("input_jitter", "block"), (
        "Mixtral's experts see the jittered input too"
    )


def test_deepseek_clusters() -> None:
    router = presets.deepseek_v3().router
    assert (router.cluster_score, router.cluster_fill, router.renormalise_eps) == ("top2_sum", "neg_inf", 1e-20)
    assert presets.glm4_moe(scale=2.5, shared_dim=3).router.scale == 2.5


def test_makemoe_follows_its_arguments() -> None:
    config = presets.makemoe(model_dim=16, num_experts=4, top_k=1, capacity_factor=None, dropout=0.0)
    assert (config.expert_dim, config.capacity, config.expert.dropout) == (64, None, 0.0)
    assert presets.makemoe().expert.dropout == 0.1
    assert presets.makemoe(expert_dim=5).expert_dim == 5


def test_makemoe_capacities_of_the_published_run() -> None:
    config = presets.makemoe()
    # batch 16, block 32: 16 * 32 * 2 / 8. A prompt of one to three tokens has no slot at all, as in the original
    assert [config.expert_capacity(size) for size in (512, 1, 3, 4, 32)] == [128, 0, 0, 1, 8]


def test_switch_capacity_is_equation_3() -> None:
    # tokens of a sequence / experts * factor, rounded up: 100 / 8 * 1.25 = 15.625
    assert presets.switch().expert_capacity(100) == 16


def test_vmoe_capacity() -> None:
    # 196 patches: 196 * 2 * 1.05 / 8 = 51.45 -> 52, a multiple of 4 already; 100: 26.25 -> 27 -> 28
    assert [presets.vmoe().expert_capacity(size) for size in (196, 100)] == [52, 28]


@pytest.mark.parametrize("name", presets.__all__)
def test_presets_can_be_small(name: str) -> None:
    extra = {"num_clusters": 2, "top_clusters": 1} if name == "deepseek_v3" else {}
    config = getattr(presets, name)(model_dim=8, expert_dim=16, num_experts=4, top_k=1, **extra)
    assert (config.model_dim, config.expert_dim, config.num_experts, config.top_k) == (8, 16, 4, 1)
    changed = dataclasses.replace(config, top_k=2)
    assert changed.router == config.router and changed.top_k == 2


def test_published_model() -> None:
    config = MakeMoEConfig()
    published = (65, 32, 128, 8, 8, 8, 2, 1.0, 0.1, True)
    assert published == (
        config.vocab_size, config.block_size, config.model_dim, config.num_heads, config.num_layers, config.num_experts,
        config.top_k, config.capacity_factor, config.dropout, config.noise,
    )
    assert config.moe == presets.makemoe()
    attention = config.block.attention
    assert (attention.scale, attention.causal, attention.dropout, attention.projections) == (
        "model_dim", True, 0.1, "per_head"
    )
    assert attention.score_scale == 128**-0.5, "the width of the model, not of a head"
    assert config.block.norm_eps == 1e-5
    assert isinstance(config.moe.expert, ExpertConfig) and isinstance(config.moe.router, RouterConfig)
