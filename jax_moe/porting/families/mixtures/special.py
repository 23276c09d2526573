"""Mixtures with a setting that few others have, of the choice, of the sum of weights or of the shared expert."""

from typing import Any

from jax_moe.config.checks import is_int
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families import decoders
from jax_moe.porting.families.family import Family, Mixture, Stack
from jax_moe.porting.families.fields import HUGGING_FACE, OF_LOGITS, Contract, Field, activation, sizes
from jax_moe.porting.families.mixtures.layouts import (
    DEEPSEEK,
    FUSED,
    LAYER,
    MLP,
    SHARED_EXPERTS,
    W123,
    both,
    each_expert,
    renamed,
    router,
)
from jax_moe.porting.families.mixtures.sigmoid import SHARED_EXPERT, V3, scale, shared
from jax_moe.porting.families.mixtures.softmax import IN_INPUTS_DTYPE, QWEN_LIKE, ROOTS, family, multimodal, nested
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row, linear, stacked, under

WIDTH = "moe_intermediate_size"
KOLIBRI = Contract(
    (*sizes("num_local_experts num_experts", WIDTH), activation(),
     Field("norm_topk_prob", "router.renormalise", False, {True: "sum", False: "none"}),
     Field("shared_expert_intermediate_size", "expert.shared_dim")),
    {"router.score": "sigmoid", "router.correction_bias": True, "router.selection": "logit"},
)
KOLIBRI_NAMES = both(
    "hf_kolibri",
    (*under((router()[0], *each_expert(), *SHARED_EXPERTS), "mlp.", ""),
     Row("moe.router.expert_bias", "E", "router.correction_bias", "E")),
    DEEPSEEK[1].rows, LAYER, MLP,
)
ERNIE = Contract(
    (*sizes("moe_num_experts num_experts", WIDTH, "moe_k num_experts_per_tok"), activation(),
     Field("moe_norm_min", "router.renormalise_eps", 1e-12), shared("moe_num_shared_experts", default=2)),
    {**HUGGING_FACE, "router.correction_bias": True, "router.renormalise": "floor", "router.weight_dtype": "input"},
    {"use_bias": False},
)


def ernie(bias: str) -> tuple[Row, ...]:
    """Router rows; the correction bias is [1, E]."""
    return (
        Row("gate.weight", "E D", "router.kernel", "D E"),
        Row(bias, "0/1 E", "router.correction_bias", "E"),
    )



def read_ernie_vl(settings: Settings) -> MoEConfig:
    """Ernie VL's contract for text: of two widths, and of two numbers of experts where they are told apart, its own."""
    values = dict(settings.values)
    for name in (WIDTH, "moe_num_experts"):
        if isinstance(values.get(name), list):
            values[name] = (settings.integers(name) or (None,))[0]
    return ERNIE.but(**OF_LOGITS).read(Settings(values, settings.errors))


def write_ernie_vl(moe: MoEConfig) -> dict[str, Any]:
    """And back; vision experts of the same width, as the contract says nothing of them."""
    return ERNIE.but(**OF_LOGITS).write(moe) | {WIDTH: [moe.expert_dim] * 2}


ERNIE_VL_NAMES = both(
    "hf_ernie_vl",
    (
        Row("gate.weight", "D E", "router.kernel", "D E"),
        Row("moe_statics.e_score_correction_bias", "0/2 E", "router.correction_bias", "E"),
        *each_expert(), *SHARED_EXPERTS,
    ),
    (*under((*ernie("gate.moe_statics.e_score_correction_bias"), *FUSED), "text_moe.", ""), *SHARED_EXPERTS),
)
COHERE = QWEN_LIKE.but(
    *sizes("num_experts num_local_experts", "intermediate_size"),
    shared("num_shared_experts", "intermediate_size", 0), without="router.renormalise",
)
COHERE_SIGMOID = COHERE.but(
    Field("norm_topk_prob", "router.renormalise", True, {True: "sum", False: "none"}), router__score="sigmoid",
    router__selection="logit",
)
COHERE_SOFTMAX = COHERE.but(router__order="select_then_softmax")


def read_cohere(settings: Settings) -> MoEConfig:
    """Cohere's contract: a softmax over the chosen or their sigmoids; the sum with the shared expert, or the mean."""
    score = settings.choice("expert_selection_fn", "softmax", ("softmax", "sigmoid"))
    how = settings.choice("shared_expert_combination_strategy", "average", ("average", "sum"))
    contract = COHERE_SIGMOID if score == "sigmoid" else COHERE_SOFTMAX
    mean = how == "average" and settings.integer("num_shared_experts", 0) > 0
    return (contract.but(router__scale=0.5, expert__shared_scale=0.5) if mean else contract).read(settings)


def write_cohere(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    sigmoid = moe.router.score == "sigmoid"
    return (COHERE_SIGMOID if sigmoid else COHERE_SOFTMAX).write(moe) | {
        "expert_selection_fn": moe.router.score,
        "shared_expert_combination_strategy": "average" if moe.expert.shared_scale == 0.5 else "sum",
    }


HY4 = V3.but(
    Field("swiglu_limit", "expert.clamp", 10.0), without="expert.activation", refused={"hidden_act": "silu"},
    expert__shared_clamp=None,
).defaults(routed_scaling_factor=2.827)
HY4_NAMES = both(
    "hf_hy_v4", (*router(), *FUSED, *renamed(SHARED_EXPERTS, "gate_proj", "linear_gate")), DEEPSEEK[1].rows,
)

STEP = Contract(
    (*sizes("n_routed_experts num_local_experts num_experts", WIDTH), activation(),
     scale("moe_router_scaling_factor", 1.0), Field("share_expert_dim", "expert.shared_dim")),
    {"router.score": "sigmoid", "router.correction_bias": True, "router.renormalise": "sum", "router.dtype": "input",
     "expert.clamp_on": "activation"},
    {"mlp_bias": False},
)
LIMITS = ("swiglu_limits", "swiglu_limits_shared")  # a layer's own: none, or 0, bounds nothing


def read_step(settings: Settings) -> MoEConfig:
    """Step's contract: every layer has its own bounds, and others for the shared expert."""
    routed, beside = (settings.number(name, 0.0, null=0.0) or None for name in LIMITS)
    return STEP.but(expert__clamp=routed, expert__shared_clamp=beside).read(settings)


def write_step(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return STEP.write(moe) | dict(zip(LIMITS, (moe.expert.clamp, moe.expert.shared.clamp), strict=True))


STEP_NAMES = both(
    "hf_step",
    (
        Row("moe.gate.weight", "E D", "router.kernel", "D E"),
        Row("moe.router_bias", "E", "router.correction_bias", "E"),
        Row("moe.gate_proj.weight", "E F D", "experts.gate", "E D F"),
        Row("moe.up_proj.weight", "E F D", "experts.up", "E D F"),
        Row("moe.down_proj.weight", "E D F", "experts.down", "E F D"),
        *renamed(SHARED_EXPERT, "shared_expert", "share_expert"),
    ),
    DEEPSEEK[1].rows, LAYER, MLP,
)
V4 = Contract(
    (*sizes("n_routed_experts num_local_experts", WIDTH), activation(), scale(default=1.5),
     Field("scoring_func", "router.score", "sqrtsoftplus", {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}),
     Field("swiglu_limit", "expert.clamp", 10.0), Field(WIDTH, "expert.shared_dim")),
    {**IN_INPUTS_DTYPE, "router.correction_bias": True, "router.renormalise": "eps"},
    {"mlp_bias": False},
).but(**OF_LOGITS)
HASH, HASH_LAYERS = "hash_moe", 3  # so many where config.json is silent


def each_layer(values: dict[str, Any]) -> dict[str, Any]:
    """mlp_layer_types, where only the number of layers in which a table of tokens chooses is said."""
    layers, first = values.get("num_hidden_layers"), values.get("num_hash_layers", HASH_LAYERS)
    if values.get("mlp_layer_types") is not None or not (isinstance(layers, int) and is_int(first)):
        return values
    return {**values, "mlp_layer_types": [HASH if i < first else "moe" for i in range(layers)]}


def read_v4(settings: Settings) -> MoEConfig:
    """DeepSeek-V4's contract: in layers of hash_moe a table of tokens in place of the correction bias."""
    if settings.choice("mlp_layer_types", "moe", ("moe", HASH)) == "moe":
        return V4.read(settings)
    tokens = settings.size("vocab_size")
    return V4.but(router__correction_bias=False, router__table_tokens=tokens).read(settings)


def write_v4(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    tokens = moe.router.table_tokens
    said = {"mlp_layer_types": HASH, "vocab_size": tokens} if tokens else {"mlp_layer_types": "moe"}
    return V4.write(moe) | said


TABLE = Row("gate.tid2eid", "V K", "router.expert_table", "V K")
W_SHARED = renamed(renamed(renamed(SHARED_EXPERTS, "gate_proj", "w1"), "up_proj", "w3"), "down_proj", "w2")
V4_NAMES = both(
    "hf_deepseek_v4", (*router(correction="gate.bias"), TABLE, *W123, *W_SHARED), (*DEEPSEEK[1].rows, TABLE),
    f"{LAYER}ffn.", MLP,
)

# At evaluation with a slot for every token (moe_eval_capacity_token_fraction 1), as published
NLLB = Contract(
    (Field("d_model", "model_dim"), Field("encoder_ffn_dim", "expert_dim"), Field("num_experts", "num_experts"),
     activation("activation_function", "relu"), Field("router_bias", "router.bias", False)),
    {**HUGGING_FACE, "top_k": 2, "router.renormalise": "sum", "router.weight_dtype": "input", "expert.gated": False,
     "expert.bias": True},
    {"second_expert_policy": "all", "moe_eval_capacity_token_fraction": 1.0, "router_dtype": "float32"},
)


def read_nllb(settings: Settings) -> MoEConfig:
    """NLLB's contract: what expert output masking leaves of the sum in the mean."""
    masked = settings.number("moe_token_dropout", 0.2)
    if not 0 <= masked < 1:
        settings.wrong("moe_token_dropout", "a number of at least 0 and below 1")
        masked = 0.0
    return NLLB.but(router__scale=1 - masked).read(settings)


def write_nllb(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return NLLB.write(moe) | {"moe_token_dropout": 1 - moe.router.scale}


NLLB_NAMES = both("hf_nllb", *2 * ((
    *linear("router.classifier", "router.", "D E"),
    *stacked(
        (*linear("fc1", "", "D F", "up", "up_bias"), *linear("fc2", "", "F D", "down", "down_bias")),
        "experts.expert_{e}.", "experts.", "e",
    ),
),), "model.encoder.layers.{l}.ffn.")

NLLB_STACKS = (
    Stack("encoder", ("encoder_layers",), NLLB_NAMES[0].within),
    Stack("decoder", ("decoder_layers",), "model.decoder.layers.{l}.ffn.", (("encoder_ffn_dim", "decoder_ffn_dim"),)),
)

SPECIAL = (
    Family("nllb_moe", Mixture(read_nllb, write_nllb, *NLLB_NAMES, {"nllb-moe": ""}, stacks=NLLB_STACKS)),
    Family("step3p7", Mixture(
        read_step, write_step, *STEP_NAMES, {"step3p7": "text_config", "step3p5": ""}, ROOTS, LIMITS,
    )),
    Family("deepseek_v4", Mixture(
        read_v4, write_v4, *V4_NAMES, {}, ("model.", ""), ("mlp_layer_types",), each_layer,
    )),
    family("kolibri1", KOLIBRI, KOLIBRI_NAMES),
    family("ernie4_5_moe", ERNIE.but(**OF_LOGITS), both(
        "hf_ernie", (*ernie("moe_statics.e_score_correction_bias"), *each_expert(), *SHARED_EXPERTS),
        (*ernie("gate.moe_statics.e_score_correction_bias"), *FUSED, *SHARED_EXPERTS),
    ), decoder=decoders.ERNIE),
    Family("ernie4_5_vl_moe", Mixture(
        read_ernie_vl, write_ernie_vl, *ERNIE_VL_NAMES, nested("ernie4_5_vl_moe"), ROOTS,
        beside=("gate.weight_1", "experts.{e}.", "vision_moe."),
    )),
    Family("cohere2_moe", Mixture(read_cohere, write_cohere, *DEEPSEEK)),
    family("hy_v4", HY4, HY4_NAMES),
    multimodal("hy_v4_vl", HY4, HY4_NAMES),
)
