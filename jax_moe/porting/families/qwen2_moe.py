"""Qwen2-MoE (Hugging Face `qwen2_moe`): gated shared expert, biased q, k, v, dense and windowed layers."""

from typing import Any

from jax_moe import presets
from jax_moe.config.models import DecoderConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.family import (
    FUSED,
    PER_EXPERT,
    Family,
    Mixture,
    Names,
    Whole,
    gated_ffn,
    read_decoder,
    read_moe,
    write_decoder,
    write_moe,
)
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row

SHARED = (*gated_ffn("shared_expert.", "shared."), Row("shared_expert_gate.weight", "1 D", "shared_gate", "D 1"))


def dense_layers(settings: Settings) -> dict[str, Any]:
    """A layer has a mixture unless named in mlp_only_layers or skipped by decoder_sparse_step."""
    layers, every = settings.size("num_hidden_layers"), settings.integer("decoder_sparse_step", 1, least=1)
    named = settings.integers("mlp_only_layers")
    dense = tuple(i for i in range(layers) if i in named or (i + 1) % every)
    return {"dense_layers": dense, "dense_dim": settings.size("intermediate_size") if dense else 0}


def write_dense(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `dense_layers`. Without dense layers Hugging Face still wants a width for them."""
    width = config.dense_dim or config.moe.expert_dim
    return {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1, "intermediate_size": width}


def sliding(settings: Settings) -> dict[str, Any]:
    """layer_types; where they are absent every other layer, from the first, up to max_window_layers."""
    layers, on = settings.size("num_hidden_layers"), settings.flag("use_sliding_window", False)
    until = settings.integer("max_window_layers", 28)
    types = settings.strings("layer_types")
    if types is None:
        types = ["sliding_attention" if on and i % 2 == 0 and i < until else "full_attention" for i in range(layers)]
    known = {"sliding_attention", "full_attention"}
    if len(types) != layers or not known.issuperset(types):
        settings.wrong("layer_types", f"{layers} of {', '.join(sorted(known))}", types)
    slides = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if slides and not on:
        settings.errors.append("layer_types names sliding_attention: use_sliding_window must be true")
    window = settings.integer("sliding_window", 4096, least=1) if slides else None
    return {"sliding_window": window, "sliding_layers": slides}


def read_mixture(settings: Settings) -> MoEConfig:
    """The contract of a layer's mixture."""
    return read_moe(
        presets.qwen2_moe, settings, "moe_intermediate_size",
        shared_dim=settings.size("shared_expert_intermediate_size"), renormalise=settings.flag("norm_topk_prob", False),
    )


def write_mixture(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return write_moe(moe, "num_experts", "moe_intermediate_size") | {
        "shared_expert_intermediate_size": moe.expert.shared_dim, "norm_topk_prob": moe.router.renormalise == "sum",
    }


def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract."""
    bias = settings.flag("qkv_bias", True)
    return read_decoder(
        settings, moe, max_positions=32768, kv_heads=16, null_kv_heads=False, qkv_bias=bias, **dense_layers(settings),
        **sliding(settings),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """config.json."""
    slides = config.sliding_layers
    kinds = ["sliding_attention" if i in slides else "full_attention" for i in range(config.num_layers)]
    return write_decoder(config) | write_dense(config) | {
        "qkv_bias": config.attention.qkv_bias, "use_sliding_window": bool(slides),
        "sliding_window": config.sliding_window, "layer_types": kinds,
    }


QWEN2_MOE = Family(
    "qwen2_moe",
    Mixture(
        read_mixture, write_mixture, on_disk=Names((*PER_EXPERT, *SHARED), "hf_experts_shared", "hf_qwen2_moe"),
        in_memory=Names((*FUSED, *SHARED), "hf_fused_shared", "hf_qwen2_moe_fused"),
    ),
    Whole("Qwen2MoeForCausalLM", read, write),
)
