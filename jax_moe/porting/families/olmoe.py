"""OLMoE (Hugging Face `olmoe`): q and k normed over the full width and clipped, weights not renormalised."""

import dataclasses
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
from jax_moe.porting.families.qwen2_moe import FUSED, PER_EXPERT
from jax_moe.porting.families.settings import Settings


def read_mixture(settings: Settings) -> MoEConfig:
    """The contract of a layer's mixture."""
    moe = read_moe(presets.olmoe, settings, "intermediate_size")
    if settings.flag("norm_topk_prob", False):
        moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, renormalise="sum"))
    return moe


def write_mixture(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return write_moe(moe, "num_experts", "intermediate_size") | {"norm_topk_prob": moe.router.renormalise == "sum"}


def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract."""
    bias = settings.flag("attention_bias", False)
    return read_decoder(
        settings, moe, max_positions=4096, norm_eps=1e-5, aux=0.01, qkv_bias=bias, output_bias=bias,
        qk_norm="full_width",
        clip_qkv=settings.number("clip_qkv", None),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """config.json."""
    return write_decoder(config) | {
        "attention_bias": config.attention.qkv_bias, "clip_qkv": config.attention.clip_qkv,
    }


OLMOE = Family(
    "olmoe",
    Mixture(
        read_mixture, write_mixture, on_disk=Names(PER_EXPERT, "hf_experts", "hf_olmoe"),
        in_memory=Names(FUSED, "hf_fused", "hf_olmoe_fused"),
    ),
    Whole("OlmoeForCausalLM", read, write),
)
