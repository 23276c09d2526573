"""OLMoE (Hugging Face `olmoe`): q and k normed over the full width and clipped, weights not renormalised."""

import dataclasses
from typing import Any

from jax_moe import presets
from jax_moe.config.decoder import DecoderConfig
from jax_moe.porting.families.family import Family, decoder_table, read_decoder, read_moe, write_decoder
from jax_moe.porting.families.qwen2_moe import FUSED, PER_EXPERT
from jax_moe.porting.families.settings import Settings


def read(settings: Settings) -> DecoderConfig:
    """The contract."""
    moe = read_moe(presets.olmoe, settings, "intermediate_size")
    if settings.flag("norm_topk_prob", False):
        moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, renormalise="sum"))
    bias = settings.flag("attention_bias", False)
    return read_decoder(
        settings, moe, max_positions=4096, norm_eps=1e-5, aux=0.01, qkv_bias=bias, output_bias=bias, qk_norm="full_width",
        clip_qkv=settings.number("clip_qkv", None),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """config.json."""
    return write_decoder(config, "num_experts", "intermediate_size") | {
        "attention_bias": config.qkv_bias, "clip_qkv": config.clip_qkv,
        "norm_topk_prob": config.moe.router.renormalise == "sum",
    }


OLMOE = Family(
    "olmoe", "OlmoeForCausalLM", read, write,
    (decoder_table("hf_olmoe", PER_EXPERT, "mlp"), decoder_table("hf_olmoe_fused", FUSED, "mlp")),
)
