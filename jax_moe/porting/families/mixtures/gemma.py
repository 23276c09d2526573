"""Gemma 4's mixture: the router has a norm and a scale of its own, each expert a factor, and a dense network stands
beside the experts, every part with norms around it. Names are those of the layer.
"""

from typing import Any

from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families import gemma4
from jax_moe.porting.families.family import LAYER, Family, Mixture, gated_ffn
from jax_moe.porting.families.fields import Contract, Field, activation, sizes
from jax_moe.porting.families.mixtures.layouts import FUSED, both
from jax_moe.porting.families.mixtures.softmax import ROOTS, nested
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row

PARTS = ("input_norm", "routed_norm", "shared_input_norm", "shared_norm")
DIFFUSION = Contract(
    (*sizes("num_experts", "moe_intermediate_size", "top_k_experts"),
     activation("hidden_activation", "gelu_pytorch_tanh"), Field("intermediate_size", "expert.shared_dim"),
     Field("rms_norm_eps", "router.input_norm_eps", 1e-6), Field("rms_norm_eps", "around.norm_eps", 1e-6)),
    {"router.renormalise": "sum", "router.dtype": "input", "router.input_norm": True, "router.expert_scale": True,
     **{f"around.{name}": "rms_wide" for name in PARTS}},
)
GEMMA = Contract(DIFFUSION.fields, DIFFUSION.fixed, {"num_kv_shared_layers": 0})


def read_gemma(settings: Settings) -> MoEConfig:
    """The contract. Without enable_moe_block there is no mixture."""
    if settings.values.get("enable_moe_block") is not True:
        settings.errors.append("enable_moe_block must be true: without it no layer has a mixture")
    return GEMMA.read(settings)


def write_gemma(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return GEMMA.write(moe) | {"enable_moe_block": True}


ROWS = (
    Row("router.scale", "D", "router.input_scale", "D"),
    Row("router.per_expert_scale", "E", "router.expert_scale", "E"),
    Row("router.proj.weight", "E D", "router.kernel", "D E"),
    *FUSED,
    *gated_ffn("mlp.", "shared."),
    Row("pre_feedforward_layernorm.weight", "D", "shared_input_norm.scale", "D"),
    Row("post_feedforward_layernorm_1.weight", "D", "shared_norm.scale", "D"),
    Row("post_feedforward_layernorm_2.weight", "D", "routed_norm.scale", "D"),
    Row("pre_feedforward_layernorm_2.weight", "D", "input_norm.scale", "D"),
)
NAMES = both("hf_gemma4_layer", ROWS, ROWS, LAYER)
SINGLE = ("head_dim", "num_key_value_heads")

GEMMAS = (
    Family(
        "gemma4", Mixture(read_gemma, write_gemma, *NAMES, nested("gemma4"), ROOTS, by_number=SINGLE),
        gemma4.GEMMA4,
    ),
    Family("diffusion_gemma", Mixture(
        DIFFUSION.read, DIFFUSION.write, *NAMES, nested("diffusion_gemma"),
        ("model.encoder.language_model.", "model.decoder.", "model."), by_number=SINGLE,
    )),
)
