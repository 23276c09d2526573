"""Qwen3-MoE (Hugging Face `qwen3_moe`): q and k normed by head, a head width of its own, no shared expert."""

from typing import Any

from jax_moe import presets
from jax_moe.config.models import DecoderConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.family import (
    Family,
    Mixture,
    Names,
    Whole,
    read_decoder,
    read_moe,
    write_decoder,
    write_moe,
)
from jax_moe.porting.families.qwen2_moe import FUSED, PER_EXPERT, dense_layers, write_dense
from jax_moe.porting.families.settings import Settings


def read_mixture(settings: Settings) -> MoEConfig:
    """The contract of a layer's mixture."""
    return read_moe(
        presets.qwen3_moe, settings, "moe_intermediate_size",
        renormalise=settings.flag("norm_topk_prob", False),
    )


def write_mixture(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return write_moe(moe, "num_experts", "moe_intermediate_size") | {"norm_topk_prob": moe.router.renormalise == "sum"}


def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract."""
    bias, layers = settings.flag("attention_bias", False), settings.size("num_hidden_layers")
    slides = settings.flag("use_sliding_window", False)
    window = settings.integer("sliding_window", 4096, null=None, least=1) if slides else None
    return read_decoder(
        settings, moe, max_positions=32768, kv_heads=4, null_kv_heads=False, qkv_bias=bias, output_bias=bias,
        qk_norm="per_head", sliding_window=window,
        sliding_layers=() if window is None else tuple(range(layers)), **dense_layers(settings),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """config.json."""
    return write_decoder(config) | write_dense(config) | {
        "attention_bias": config.attention.qkv_bias, "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    }


QWEN3_MOE = Family(
    "qwen3_moe",
    Mixture(
        read_mixture, write_mixture, on_disk=Names(PER_EXPERT, "hf_experts", "hf_qwen3_moe"),
        in_memory=Names(FUSED, "hf_fused", "hf_qwen3_moe_fused"),
    ),
    Whole(
        "Qwen3MoeForCausalLM", read, write,
        order=("self_attn.", "mlp.experts.", "mlp.", "input_layernorm.", "post_attention_layernorm."),
    ),
)
