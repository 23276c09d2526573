"""Granite-MoE (Hugging Face `granitemoe`): experts fused on disk, four multipliers."""

from typing import Any

from jax_moe import presets
from jax_moe.config.models import DecoderConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.family import (
    Family,
    Mixture,
    Names,
    Whole,
    fused_experts,
    read_decoder,
    read_moe,
    write_decoder,
    write_moe,
)
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row


def read_mixture(settings: Settings) -> MoEConfig:
    """The contract of a layer's mixture."""
    return read_moe(presets.granite_moe, settings, "intermediate_size")


def write_mixture(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return write_moe(moe, "num_local_experts", "intermediate_size")


def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract."""
    bias = settings.flag("attention_bias", False)
    return read_decoder(
        settings, moe, max_positions=2048, qkv_bias=bias, output_bias=bias,
        embedding_multiplier=settings.number("embedding_multiplier", 1.0),
        attention_multiplier=settings.number("attention_multiplier", 1.0),
        residual_multiplier=settings.number("residual_multiplier", 1.0),
        logits_divisor=settings.number("logits_scaling", 1.0),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """config.json."""
    return write_decoder(config) | {
        "attention_bias": config.attention.qkv_bias, "embedding_multiplier": config.embedding_multiplier,
        "attention_multiplier": config.attention.score_scale, "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_divisor,
    }


ON_DISK = (
    Row("router.layer.weight", "E D", "router.kernel", "D E"),
    *fused_experts("input_linear.weight", "output_linear.weight"),
)
IN_MEMORY = (
    Row("router.weight", "E D", "router.kernel", "D E"),
    *fused_experts("experts.gate_up_proj", "experts.down_proj"),
)
WITHIN = "model.layers.{l}.block_sparse_moe."
GRANITEMOE = Family(
    "granitemoe",
    Mixture(
        read_mixture, write_mixture, on_disk=Names(ON_DISK, "hf_granitemoe", "hf_granitemoe", WITHIN),
        in_memory=Names(IN_MEMORY, "hf_granitemoe_in_memory", "hf_granitemoe_in_memory", WITHIN),
    ),
    Whole(
        "GraniteMoeForCausalLM", read, write,
        order=("self_attn.", "input_layernorm.", "post_attention_layernorm.", "block_sparse_moe."),
    ),
)
