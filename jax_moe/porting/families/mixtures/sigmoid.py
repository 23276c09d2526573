"""Mixtures of DeepSeek's line: a correction bias, clusters of experts, scaled weights; their scores are mostly
sigmoids.
"""

from typing import Any

from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families import decoders, latent
from jax_moe.porting.families.family import Family, Mixture, Whole
from jax_moe.porting.families.fields import OF_LOGITS, Contract, Field, activation, sizes
from jax_moe.porting.families.mixtures.layouts import (
    DEEPSEEK,
    FORWARD,
    FUSED,
    MLP,
    SHARED_EXPERTS,
    SPARSE,
    W123,
    both,
    each_expert,
    renamed,
    router,
)
from jax_moe.porting.families.mixtures.softmax import ROOTS, family, multimodal, nested
from jax_moe.porting.families.settings import Settings

WIDTH = "moe_intermediate_size"
NORM = Field("norm_topk_prob", "router.renormalise", True, {True: "eps", False: "none"})
CLUSTERS = (Field("n_group", "router.num_clusters", 1, null=1), Field("topk_group", "router.top_clusters", 1, null=1))


def scale(name: str = "routed_scaling_factor", default: float = 2.5) -> Field:
    """What multiplies the weights of routed experts."""
    return Field(name, "router.scale", default)


def shared(name: str = "n_shared_experts", width: str = WIDTH, default: int = 1) -> Field:
    """Shared experts, counted, each as wide as a routed expert: together one FFN."""
    return Field(name, "expert.shared_dim", default, times=width)


V3 = Contract(
    (*sizes("n_routed_experts num_local_experts num_experts", WIDTH), activation(), NORM, scale(), *CLUSTERS, shared()),
    {"router.score": "sigmoid", "router.correction_bias": True},
)
EIGHT = V3.defaults(n_group=8, topk_group=4)
ONE = V3.defaults(routed_scaling_factor=1.0)
DOTS1 = ONE.defaults(norm_topk_prob=False)
EXPERTS = V3.but(*sizes("num_experts num_local_experts", WIDTH))
KIMI = V3.but(
    *sizes("num_experts num_local_experts", WIDTH, "num_experts_per_token num_experts_per_tok"),
    Field("moe_renormalize norm_topk_prob", "router.renormalise", True, NORM.words),
    Field("num_expert_group n_group", "router.num_clusters", 1, null=1), shared("num_shared_experts n_shared_experts"),
).defaults(routed_scaling_factor=2.446)
BAILING = KIMI.defaults(routed_scaling_factor=2.5, num_expert_group=8, topk_group=4)
NONE_SHARED = V3.but(without="expert.shared_dim")
HY3 = EXPERTS.but(
    scale("router_scaling_factor", 2.826), shared("num_shared_experts"),
    without="router.num_clusters router.top_clusters", router__renormalise="eps",
)
AFMOE = HY3.but(scale("route_scale", 1.0), shared("num_shared_experts", default=2), router__dtype="input")
BEAM = EXPERTS.but(without="expert.shared_dim").defaults(n_group=8, topk_group=4)
MINIMAX = Contract(
    (*sizes("num_local_experts num_experts", "intermediate_size"), activation(),
     Field("router_jitter_noise", "router.jitter_eps", 0.0)),
    {**V3.fixed, "router.renormalise": "sum", "router.dtype": "input", "router.jitter_scope": "block"},
)
LAGUNA = EXPERTS.but(
    scale("moe_routed_scaling_factor", 1.0), Field("shared_expert_intermediate_size", "expert.shared_dim"),
    without="router.num_clusters router.top_clusters", refused={"moe_router_logit_softcapping": 0.0},
    router__renormalise="sum", router__dtype="input", router__weight_dtype="input",
)
FLINT = EXPERTS.but(
    Field("norm_topk_prob", "router.renormalise", True, {True: "sum", False: "none"}),
    Field("shared_expert_intermediate_size", "expert.shared_dim"),
    without="router.num_clusters router.top_clusters router.scale", router__correction_bias=False,
)
LFM2 = EXPERTS.but(
    Field("use_expert_bias", "router.correction_bias", True), scale(default=1.0),
    without="router.num_clusters router.top_clusters expert.shared_dim expert.activation",
    router__renormalise_eps=1e-6, router__dtype="input",
)
SOFTMAX_FIXED = {"router.cluster_fill": "zero"}
MISTRAL = Contract(V3.fields, SOFTMAX_FIXED).defaults(routed_scaling_factor=1.0)
MISTRAL4 = MISTRAL.but(router__dtype="input")
V2 = MISTRAL.but(router__cluster_score="max", router__renormalise="none").defaults(n_shared_experts=2)
V2_GREEDY = V2.but(without="router.num_clusters router.top_clusters")


def read_v2(settings: Settings) -> MoEConfig:
    """DeepSeek-V2's contract: clusters only where the method says so."""
    method = settings.choice("topk_method", "greedy", ("greedy", "group_limited_greedy"))
    return (V2_GREEDY if method == "greedy" else V2).read(settings)


def write_v2(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    greedy = moe.router.num_clusters == 1
    return (V2_GREEDY if greedy else V2).write(moe) | {"topk_method": "greedy" if greedy else "group_limited_greedy"}


def v2(name: str, around: bool = False, decoder: Whole | None = None) -> Family:
    """A model type with DeepSeek-V2's mixture; `around`: of its text model."""
    types, roots = (nested(name), ROOTS) if around else ({}, ("model.",))
    return Family(name, Mixture(read_v2, write_v2, *DEEPSEEK, types, roots), decoder)


MEMORY = DEEPSEEK[1].rows
MISTRAL4_NAMES = both("hf_mistral4_layer", MEMORY, MEMORY)  # written as it is in memory
SHARED_EXPERT = renamed(SHARED_EXPERTS, "shared_experts", "shared_expert")
OWN = router(correction="e_score_correction_bias")  # the bias is the mixture's own
HY3_DISK = (*router("router.gate.weight", "expert_bias"), *each_expert())
KIMI_NAMES = both("hf_kimi", (*router(), *W123, *SHARED_EXPERTS), MEMORY, SPARSE, MLP)
BAILING_NAMES = both(
    "hf_bailing", (*router(correction="gate.expert_bias"), *each_expert(), *SHARED_EXPERTS), MEMORY,
)
EXAONE_NAMES = both("hf_exaone", (*OWN, *each_expert(), *SHARED_EXPERTS), MEMORY)
HY3_NAMES = both(
    "hf_hy_v3", (*HY3_DISK, *renamed(SHARED_EXPERTS, "shared_experts", "shared_mlp")), (*OWN, *FUSED, *SHARED_EXPERTS),
)
AFMOE_NAMES = both("hf_afmoe", (*HY3_DISK, *SHARED_EXPERTS), (*HY3_DISK[:2], *FUSED, *SHARED_EXPERTS))
MINIMAX_NAMES = both("hf_minimax_m2", (*OWN, *W123), (*OWN, *FUSED), SPARSE, MLP)
LAGUNA_NAMES = both(
    "hf_laguna", (*router(correction="experts.e_score_correction_bias"), *each_expert(), *SHARED_EXPERT), MEMORY,
)
FLINT_NAMES = both("hf_flint", (*router(), *each_expert(), *SHARED_EXPERT), (*router(), *FUSED, *SHARED_EXPERT))
LFM2_NAMES = both(
    "hf_lfm2", (*router(correction="expert_bias"), *W123), (*router(correction="expert_bias"), *FUSED), FORWARD,
)

SIGMOID = (
    family("deepseek_v3", EIGHT, DEEPSEEK, {"kimi_k2": ""}, decoder=latent.DEEPSEEK_V3),
    family("deepseek_v32", EIGHT, DEEPSEEK),
    family("glm4_moe", ONE, DEEPSEEK, decoder=decoders.GLM4),
    family("glm4_moe_lite", V3.defaults(routed_scaling_factor=1.8), DEEPSEEK, decoder=latent.GLM4_LITE),
    multimodal("glm4v_moe", ONE.but(**OF_LOGITS), DEEPSEEK),
    family("glm_moe_dsa", V3, DEEPSEEK),
    family("solar_open", ONE, DEEPSEEK, decoder=decoders.SOLAR),
    family("dots1", DOTS1, DEEPSEEK, decoder=decoders.DOTS1),
    multimodal("dots3_note", ONE.but(shared(width="shared_experts_intermediate_size")), DEEPSEEK),
    family("mimo_v2_flash", NONE_SHARED.defaults(routed_scaling_factor=1.0), DEEPSEEK),
    family("axk2", V3.but(router__cluster_fill="zero"), DEEPSEEK),
    family("exaone_moe", EXPERTS.but(shared("num_shared_experts")), EXAONE_NAMES, decoder=decoders.EXAONE),
    family("kimi_linear", KIMI, KIMI_NAMES),
    family("bailing_hybrid", BAILING, BAILING_NAMES),
    family("hy_v3", HY3, HY3_NAMES),
    family("afmoe", AFMOE, AFMOE_NAMES),
    family("beam", BEAM, DEEPSEEK),
    family("minimax_m2", MINIMAX.but(**OF_LOGITS), MINIMAX_NAMES, decoder=decoders.MINIMAX),
    family("laguna", LAGUNA.but(**OF_LOGITS), LAGUNA_NAMES),
    family("flint", FLINT.but(**OF_LOGITS), FLINT_NAMES),
    family("lfm2_moe", LFM2, LFM2_NAMES),
    family("mistral4", MISTRAL4, MISTRAL4_NAMES, decoder=latent.MISTRAL4),
    v2("deepseek_v2", decoder=latent.DEEPSEEK_V2),
    v2("deepseek_ocr2", around=True),
    v2("unlimited_ocr", around=True),
)
