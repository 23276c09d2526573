"""Mixtures with more than experts and shared experts: experts that return their input, maps and norms around them."""

from dataclasses import replace
from typing import Any

from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.family import Family, Mixture
from jax_moe.porting.families.fields import Contract, Field, activation, sizes
from jax_moe.porting.families.mixtures.layouts import DEEPSEEK, FUSED, LAYER, MLP, both, each_expert, router
from jax_moe.porting.families.mixtures.sigmoid import EIGHT, V3, WIDTH, scale
from jax_moe.porting.families.mixtures.softmax import family, multimodal, nested
from jax_moe.porting.families.settings import ACTIVATIONS, Settings
from jax_moe.porting.table.rows import Row, under

LONGCAT = Contract(
    (*sizes("n_routed_experts num_local_experts", "expert_ffn_hidden_size moe_intermediate_size",
            "moe_topk num_experts_per_tok"), activation(), scale(default=6.0)),
    {"router.correction_bias": True}, {"router_bias": False, "zero_expert_type": "identity"},
)


def read_longcat(settings: Settings) -> MoEConfig:
    """LongCat's contract: its zero experts, counted apart, return their input."""
    moe, same = LONGCAT.read(settings), settings.integer("zero_expert_num", 256, null=0, least=0)
    return replace(moe, num_experts=moe.num_experts + same, identity_experts=same)


def write_longcat(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return LONGCAT.write(replace(moe, num_experts=moe.num_networks, identity_experts=0)) | {
        "zero_expert_num": moe.identity_experts
    }


CLASSIFIER = router("router.classifier.weight", "router.e_score_correction_bias")
LONGCAT_NAMES = both("hf_longcat", (*CLASSIFIER, *each_expert()), (*CLASSIFIER, *FUSED))

NEMOTRON = V3.but(
    Field("mlp_hidden_act", "expert.activation", "relu2", {**ACTIVATIONS, "relu2": "relu2"}),
    Field("moe_shared_expert_intermediate_size", "expert.shared_dim", 7688),
    Field("moe_latent_size", "around.latent_dim", 0, null=0), refused={"mlp_bias": False}, expert__gated=False,
).defaults(routed_scaling_factor=1.0)


def write_nemotron(moe: MoEConfig) -> dict[str, Any]:
    """Nemotron-H's settings: null, not 0, where the experts have the model's width."""
    return NEMOTRON.write(moe) | {"moe_latent_size": moe.around.latent_dim or None}


NEMOTRON_AROUND = (
    Row("fc1_latent_proj.weight", "I D", "latent_in", "D I"), Row("fc2_latent_proj.weight", "D I", "latent_out", "I D"),
    Row("shared_experts.up_proj.weight", "F D", "shared.up", "0/1 D F"),
    Row("shared_experts.down_proj.weight", "D F", "shared.down", "0/1 F D"),
)
NEMOTRON_MEMORY = (
    Row("experts.up_proj", "E F D", "experts.up", "E D F"), Row("experts.down_proj", "E D F", "experts.down", "E F D"),
)
NEMOTRON_NAMES = both(
    "hf_nemotron_h", (*router(), *each_expert(), *NEMOTRON_AROUND), (*router(), *NEMOTRON_MEMORY, *NEMOTRON_AROUND),
    f"{LAYER}mixer.",
)
MUSE = Contract(
    (*sizes("num_local_experts num_experts", WIDTH), activation(), scale(default=1.0),
     Field("moe_hidden_size", "around.latent_dim"),
     Field("output_multiplier", "router.logit_scale", 0.1767766952966369),
     Field("rms_norm_eps", "around.latent_norm_eps", 1e-5), Field("post_norm_eps", "expert.answer_norm_eps", 1e-8)),
    {"router.score": "sigmoid", "router.correction_bias": True, "router.renormalise": "eps",
     "router.renormalise_eps": 1e-15, "around.latent_norm": "rms_centered", "expert.answer_norm": "rms_of_scaled"},
)
MUSE_ROWS = (
    *router(), *FUSED,
    Row("pre_expert_proj.weight", "I D", "latent_in", "D I"),
    Row("post_expert_proj.weight", "D I", "latent_out", "I D"),
    Row("pre_expert_norm.weight", "D", "latent_norm.scale", "D"),
    Row("experts.post_expert_norm.weight", "D", "experts.answer_scale", "D"),
)
AXK1 = EIGHT.but(Field("rms_norm_eps", "around.output_norm_eps", 1e-6), around__output_norm="rms")
AXK1_NAMES = both(
    "hf_axk1",
    (*under(DEEPSEEK[0].rows, "mlp.", ""), Row("post_mlp_layernorm.weight", "D", "output_norm.scale", "D")),
    (*DEEPSEEK[1].rows, Row("post_mlp_layernorm.weight", "D", "output_norm.scale", "D")), LAYER, MLP,
)

SOFT = Contract(
    (*sizes("n_routed_experts num_local_experts", "moe_intermediate_size intermediate_size"),
     scale("route_scale routed_scaling_factor", 8.0),
     Field("scoring_func", "router.score", "sigmoid", {"sigmoid": "sigmoid"}),
     Field("mlp_gate_softcap", "expert.gate_softcap", 4.0), Field("mlp_up_softcap", "expert.up_softcap", 25.0)),
    {"router.correction_bias": True, "router.renormalise": "eps"},
)
INKLING = Contract(
    (*sizes("n_routed_experts num_local_experts", WIDTH), activation(), scale("route_scale", 8.0),
     Field("n_shared_experts", "router.shared_experts", 2), Field(WIDTH, "expert.shared_dim")),
    {"router.score": "sigmoid", "router.correction_bias": True, "router.renormalise": "sum",
     "router.learned_scale": True, "router.weight_dtype": "input"},
    {"shared_expert_sink": True},
)
# Gate and up by turns, as published; and one after the other
TURNS = (
    Row("experts.w13_weight", "E (F 0/2) D", "experts.gate", "E D F"),
    Row("experts.w13_weight", "E (F 1/2) D", "experts.up", "E D F"),
    Row("experts.w2_weight", "E D F", "experts.down", "E F D"),
)
WEIGHED = (
    Row("shared_experts.shared_w13_weight", "Y (F 0/2) D", "shared_experts.gate", "Y D F"),
    Row("shared_experts.shared_w13_weight", "Y (F 1/2) D", "shared_experts.up", "Y D F"),
    Row("shared_experts.shared_w2_weight", "Y D F", "shared_experts.down", "Y F D"),
)
WEIGHED_MEMORY = (
    Row("shared_experts.gate_proj", "Y F D", "shared_experts.gate", "Y D F"),
    Row("shared_experts.up_proj", "Y F D", "shared_experts.up", "Y D F"),
    Row("shared_experts.down_proj", "Y D F", "shared_experts.down", "Y F D"),
)
SCALE = Row("gate.global_scale", "1", "router.learned_scale", "1")
SOFT_NAMES = both("hf_inkling2", (*router(correction="gate.bias"), *TURNS), (*router(), *FUSED))
INKLING_NAMES = both(
    "hf_inkling", (*router(correction="gate.bias"), SCALE, *TURNS, *WEIGHED),
    (*router(), SCALE, *FUSED, *WEIGHED_MEMORY),
)
INKLING_ROOTS = ("model.llm.", "model.language_model.", "model.", "")


def read_inkling(settings: Settings) -> MoEConfig:
    """Inkling's contract: beside a dense_intermediate_size, intermediate_size is the experts' width."""
    if settings.values.get("dense_intermediate_size") is None:
        return INKLING.read(settings)
    width = {WIDTH: settings.values.get("intermediate_size")}
    return INKLING.read(Settings({**settings.values, **width}, settings.errors))


AROUND = (
    family("inkling2", SOFT, SOFT_NAMES, nested("inkling2"), INKLING_ROOTS),
    family("inkling2_loop", SOFT, SOFT_NAMES, nested("inkling2_loop"), INKLING_ROOTS),
    Family("inkling", Mixture(
        read_inkling, INKLING.write, *INKLING_NAMES, {"inkling_mm_model": "text_config", "inkling_text": ""},
        INKLING_ROOTS,
    )),
    Family("nemotron_h", Mixture(NEMOTRON.read, write_nemotron, *NEMOTRON_NAMES, roots=("backbone.", "model."))),
    multimodal("muse_spark", MUSE, both("hf_muse_spark", MUSE_ROWS, MUSE_ROWS)),
    family("axk1", AXK1, AXK1_NAMES),
    # transformers 5.24 writes a gate and an up of zero experts too, which nothing reads
    Family("longcat_flash", Mixture(read_longcat, write_longcat, *LONGCAT_NAMES, beside=("experts.{e}.",))),
)
