"""Mixtures of other shapes: fused and transposed tensors, biases, clamps, weights on the input, settings of their
own.
"""

from typing import Any

from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families import decoders, llama4
from jax_moe.porting.families.family import Family, Mixture
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
    columns,
    renamed,
    router,
)
from jax_moe.porting.families.mixtures.sigmoid import MINIMAX, MISTRAL, SHARED_EXPERT, V3, scale
from jax_moe.porting.families.mixtures.softmax import CHOSEN_LOGITS, MIXTRAL_LIKE, family, multimodal
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row

SILU, ALPHA = {"hidden_act": "silu"}, {"swiglu_alpha": 1.702}
LIMIT = Field("swiglu_limit", "expert.clamp", 7.0)
OSS_EXPERTS = {"expert.activation": "quick_gelu", "expert.up_offset": 1.0}  # (up + 1) * gate * sigmoid(1.702 gate)
OSS = Contract(
    (*sizes("num_local_experts num_experts", "intermediate_size"), LIMIT),
    {**CHOSEN_LOGITS, **OSS_EXPERTS, "router.bias": True, "expert.bias": True}, ALPHA,
)
PRIVACY = OSS.but(router__dtype="float32", router__weight_dtype="float32")
LLAMA4 = Contract(
    (*sizes("num_local_experts num_experts", "intermediate_size"), activation(),
     Field("intermediate_size", "expert.shared_dim")),
    {"router.score": "sigmoid", "router.dtype": "input", "router.weight_dtype": "input", "expert.weight_on": "input",
     "router.selection": "logit"},
)
GLM5 = V3.but(Field("swiglu_limit", "expert.clamp", 10.0), without="expert.activation", refused=SILU)
M3 = MINIMAX.but(
    LIMIT, scale(default=2.0), Field("shared_intermediate_size", "expert.shared_dim"),
    without="router.jitter_eps expert.activation", refused=ALPHA,
)
M3 = Contract(M3.fields, {**M3.fixed, **OSS_EXPERTS}, M3.refused)
LARGE4 = MISTRAL.but(router__renormalise="eps")
DBRX = MIXTRAL_LIKE.but(
    *sizes("moe_num_experts", "ffn_hidden_size", "moe_top_k"),
    Field("moe_normalize_expert_weights", "router.renormalise", 1.0, {1.0: "sum", None: "none"}, null=None),
    without="expert.activation router.jitter_eps", refused={"ffn_act_fn": {"name": "silu"}, "moe_jitter_eps": 0.0},
    router__weight_dtype="input",
)


def read_dbrx(settings: Settings) -> MoEConfig:
    """DBRX's contract: the experts' settings stand in ffn_config, the width at the top."""
    inner = settings.take("ffn_config", dict, {}, {})
    return DBRX.read(Settings({**inner, "hidden_size": settings.values.get("d_model")}, settings.errors))


def write_dbrx(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    written = DBRX.write(moe)
    return {"d_model": written.pop("hidden_size"), "ffn_config": written}


def biased(halves: str) -> tuple[Row, ...]:
    """Router and experts with biases; `halves`: how gate and up stand in one tensor."""
    up = halves.replace("0/2", "1/2")
    return (
        Row("router.weight", "E D", "router.kernel", "D E"),
        Row("router.bias", "E", "router.bias", "E"),
        *columns(halves=halves),
        Row("experts.gate_up_proj_bias", f"E ({halves})", "experts.gate_bias", "E F"),
        Row("experts.gate_up_proj_bias", f"E ({up})", "experts.up_bias", "E F"),
        Row("experts.down_proj_bias", "E D", "experts.down_bias", "E D"),
    )


FIRST = router("router.weight")
LLAMA4_NAMES = both("hf_llama4", (*FIRST, *columns(), *SHARED_EXPERT), (*FIRST, *columns(), *SHARED_EXPERT), FORWARD)
M3_SHARED = (
    Row("shared_experts.gate_up_proj.weight", "(0/2 F) D", "shared.gate", "0/1 D F"),
    Row("shared_experts.gate_up_proj.weight", "(1/2 F) D", "shared.up", "0/1 D F"),
    Row("shared_experts.down_proj.weight", "D F", "shared.down", "0/1 F D"),
)
M3_NAMES = both(
    "hf_minimax_m3", (*router(correction="e_score_correction_bias"), *W123, *SHARED_EXPERTS),
    (*router(), *FUSED, *M3_SHARED), SPARSE, MLP,
)
W_SHARED = tuple(
    row for old, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
    for row in renamed(SHARED_EXPERTS, old, new) if new in row.theirs
)
LARGE4_NAMES = both("hf_mistral_large4", (*router(), *W123, *W_SHARED), DEEPSEEK[1].rows, "layers.{l}.", MLP)
DBRX_ROWS = (
    Row("router.layer.weight", "E D", "router.kernel", "D E"),
    Row("experts.mlp.w1", "(E F) D", "experts.gate", "E D F"),
    Row("experts.mlp.v1", "(E F) D", "experts.up", "E D F"),
    Row("experts.mlp.w2", "(E F) D", "experts.down", "E F D"),
)
DBRX_NAMES = both("hf_dbrx", DBRX_ROWS, DBRX_ROWS, "transformer.blocks.{l}.ffn.")

FUSED_FAMILIES = (
    family("gpt_oss", OSS, both("hf_gpt_oss", biased("F 0/2"), biased("F 0/2")), decoder=decoders.GPT_OSS),
    family("openai_privacy_filter", PRIVACY, both("hf_privacy_filter", biased("0/2 F"), biased("0/2 F"))),
    multimodal("llama4", LLAMA4, LLAMA4_NAMES, decoder=llama4.LLAMA4),
    multimodal("glm5_next", GLM5.but(**OF_LOGITS), DEEPSEEK),
    multimodal("minimax_m3_vl", M3.but(**OF_LOGITS), M3_NAMES),
    multimodal("mistral_large4", LARGE4, LARGE4_NAMES),
    Family("dbrx", Mixture(read_dbrx, write_dbrx, *DBRX_NAMES)),
)
