"""Mixtures whose router takes a softmax: over all experts (Mixtral, Qwen) or over the chosen (Granite, Aria)."""

from dataclasses import replace

from jax_moe.porting.families import decoders
from jax_moe.porting.families.family import Family, Mixture, Names, Whole, fused_experts
from jax_moe.porting.families.fields import HUGGING_FACE, Contract, Field, activation, sizes
from jax_moe.porting.families.mixtures.layouts import (
    FORWARD,
    FUSED,
    GRANITE,
    MIXTRAL,
    MLP,
    QWEN,
    SHARED_EXPERTS,
    both,
    columns,
    each_expert,
    renamed,
    router,
)
from jax_moe.porting.families.qwen3_next import QWEN3_5, QWEN3_NEXT
from jax_moe.porting.table.rows import Row

IN_INPUTS_DTYPE = {"router.dtype": "input", "router.weight_dtype": "input"}
WIDTH = "moe_intermediate_size"

QWEN_LIKE = Contract(
    (*sizes("num_experts num_local_experts", WIDTH), activation(),
     Field("norm_topk_prob", "router.renormalise", False, {True: "sum", False: "none"})),
    {**HUGGING_FACE, **IN_INPUTS_DTYPE},
)
SHARED = Field("shared_expert_intermediate_size", "expert.shared_dim")
NEXT = QWEN_LIKE.but(SHARED, expert__shared_gate=True).defaults(norm_topk_prob=True)
ALWAYS = QWEN_LIKE.but(router__renormalise="sum")
LARA = NEXT.but(expert__shared_gate=False, router__dtype="float32")
MIXTRAL_LIKE = Contract(
    (*sizes("num_local_experts num_experts", "intermediate_size"), activation(),
     Field("router_jitter_noise", "router.jitter_eps", 0.0)),
    {**HUGGING_FACE, "router.renormalise": "sum", "router.dtype": "input", "router.jitter_scope": "block"},
)
FLEX = QWEN_LIKE.but(*sizes("num_experts num_local_experts", "intermediate_size"))
JAMBA = FLEX.but(router__renormalise="none")
HUNYUAN = Contract(
    (*sizes("num_experts num_local_experts", "intermediate_size", "moe_topk num_experts_per_tok"), activation(),
     Field("intermediate_size", "expert.shared_dim")),
    {**HUGGING_FACE, "router.renormalise": "sum"},
)
# transformers 5.24 draws the jitter of training twice, in the mixture and again in its router; once, as here and as
# published, in the mixture alone
PHI = Contract(
    (*sizes("num_local_experts num_experts", "intermediate_size"), activation(),
     Field("router_jitter_noise", "router.mixer_eps", 0.01), Field("input_jitter_noise", "router.jitter_eps", 0.0)),
    {**HUGGING_FACE, **IN_INPUTS_DTYPE, "router.order": "sparse_mixer", "router.jitter_scope": "block"},
    {"num_experts_per_tok": 2},  # transformers does not read it: its router chooses two
)
CHOSEN_LOGITS = {**HUGGING_FACE, **IN_INPUTS_DTYPE, "router.order": "select_then_softmax"}
GRANITE_LIKE = Contract(
    (*sizes("num_local_experts num_experts", "intermediate_size"), activation(),
     Field("shared_intermediate_size", "expert.shared_dim", 0)),
    CHOSEN_LOGITS,
)
JET = Contract(
    (*sizes("num_local_experts num_experts", "intermediate_size"), activation("activation_function")),
    {**CHOSEN_LOGITS, "answer_bias": True},
)
ARIA = Contract(
    (*sizes("moe_num_experts", "intermediate_size", "moe_topk"), activation(),
     Field("moe_num_shared_experts", "expert.shared_dim", 2, times="intermediate_size")),
    CHOSEN_LOGITS,
)


def family(
    name: str, contract: Contract, names: tuple[Names, Names], types: dict[str, str] | None = None,
    roots: tuple[str, ...] = ("model.",), by_layer: tuple[str, ...] = (), decoder: Whole | None = None,
) -> Family:
    """A model type known by its mixture, or with its decoder."""
    return Family(name, Mixture(contract.read, contract.write, *names, types or {}, roots, by_layer), decoder)


ROOTS = ("model.language_model.", "model.", "language_model.model.", "")  # of a text model in another model, and alone


def nested(name: str) -> dict[str, str]:
    """The types of a model around a text model: settings in text_config, or at the top of the text model alone."""
    return {name: "text_config", f"{name}_text": ""}


def multimodal(
    name: str, contract: Contract, names: tuple[Names, Names], decoder: Whole | None = None
) -> Family:
    """A model type whose text model has the mixture."""
    return family(name, contract, names, nested(name), ROOTS, decoder=decoder)


TRANSPOSED = both("hf_qwen_vl", (*router(), *columns()), (*router(), *FUSED))
JAMBA_NAMES = both(
    "hf_jamba", (*router("router.weight"), *each_expert()), (*router("router.weight"), *FUSED), FORWARD,
)
SHARED_MLP = renamed(SHARED_EXPERTS, "shared_experts", "shared_mlp")
WG = router("gate.wg.weight")
HUNYUAN_NAMES = both("hf_hunyuan", (*WG, *each_expert(), *SHARED_MLP), (*WG, *FUSED, *SHARED_MLP))
ARIA_NAMES = both(
    "hf_aria",
    (*router("router.weight"), *columns("experts.fc1.weight", "experts.fc2.weight"), *SHARED_EXPERTS),
    (*router("router.weight"), *columns(), *SHARED_EXPERTS),
)

PHI_NAMES = (MIXTRAL[0], replace(JAMBA_NAMES[1], within=MLP))
JET_NAMES = both("hf_jetmoe", *2 * ((
    Row("router.layer.weight", "E D", "router.kernel", "D E"), Row("bias", "D", "answer_bias", "D"),
    *fused_experts("input_linear.weight", "output_linear.weight"),
),))
OMNI = {
    "qwen3_omni_moe": "thinker_config.text_config", "qwen3_omni_moe_thinker": "text_config", "qwen3_omni_moe_text": "",
}

SOFTMAX = (
    family("flex_olmo", FLEX, QWEN, decoder=decoders.FLEX_OLMO),
    family("mellum", QWEN_LIKE.but(*sizes("num_local_experts num_experts", WIDTH)).defaults(norm_topk_prob=True), QWEN),
    family("qwen3_next", NEXT, QWEN, decoder=QWEN3_NEXT),
    multimodal("qwen3_5_moe", NEXT.but(router__renormalise="sum"), QWEN, decoder=QWEN3_5),
    multimodal("qwen4_exp", NEXT, QWEN),
    multimodal("qwen3_vl_moe", ALWAYS.but(*sizes("num_local_experts num_experts", WIDTH)), TRANSPOSED),
    family("qwen3_omni_moe", QWEN_LIKE.defaults(norm_topk_prob=True), QWEN, OMNI, ("thinker.model.", "model.")),
    family("lara_mini", LARA, QWEN),
    family("minimax", MIXTRAL_LIKE, MIXTRAL),
    family("jamba", JAMBA, JAMBA_NAMES),
    family("phimoe", PHI, PHI_NAMES, decoder=decoders.PHI),
    family(
        "hunyuan_v1_moe", HUNYUAN, HUNYUAN_NAMES, by_layer=("moe_topk", "num_experts", "intermediate_size"),
        decoder=decoders.HUNYUAN,
    ),
    family("granitemoeshared", GRANITE_LIKE, GRANITE, decoder=decoders.GRANITE_SHARED),
    family("granitemoehybrid", GRANITE_LIKE.defaults(shared_intermediate_size=1024), GRANITE),
    family("granitemoe_swa", GRANITE_LIKE, GRANITE),
    multimodal("aria", ARIA, ARIA_NAMES),
    family("jetmoe", JET, JET_NAMES),
)
