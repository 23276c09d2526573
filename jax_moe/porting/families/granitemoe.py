"""Granite-MoE (Hugging Face `granitemoe`): experts fused on disk, four multipliers."""

from typing import Any

from jax_moe import presets
from jax_moe.config.decoder import DecoderConfig
from jax_moe.porting.families.family import Family, decoder_table, fused_experts, read_decoder, read_moe, write_decoder
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row


def read(settings: Settings) -> DecoderConfig:
    """The contract."""
    moe = read_moe(presets.granite_moe, settings, "intermediate_size")
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
    return write_decoder(config, "num_local_experts", "intermediate_size") | {
        "attention_bias": config.qkv_bias, "embedding_multiplier": config.embedding_multiplier,
        "attention_multiplier": config.score_scale, "residual_multiplier": config.residual_multiplier,
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
GRANITEMOE = Family(
    "granitemoe", "GraniteMoeForCausalLM", read, write,
    (
        decoder_table("hf_granitemoe", ON_DISK, "block_sparse_moe"),
        decoder_table("hf_granitemoe_in_memory", IN_MEMORY, "block_sparse_moe"),
    ),
)
