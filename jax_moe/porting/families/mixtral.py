"""Mixtral (Hugging Face `mixtral`): w1 is the gate, w3 goes up, w2 down; the window, if any, holds in all layers."""

from typing import Any

from jax_moe import presets
from jax_moe.config.models import DecoderConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.moe import MoE
from jax_moe.porting.families.choices import StateDict, size_in
from jax_moe.porting.families.family import (
    FUSED,
    ROUTER,
    Family,
    Mixture,
    Names,
    Whole,
    read_decoder,
    read_moe,
    write_decoder,
    write_moe,
)
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.plan import Shapes
from jax_moe.porting.table.rows import Row

PER_EXPERT = (
    *ROUTER,
    Row("experts.{e}.w1.weight", "F D", "experts.gate", "e D F"),
    Row("experts.{e}.w2.weight", "D F", "experts.down", "e F D"),
    Row("experts.{e}.w3.weight", "F D", "experts.up", "e D F"),
)
ON_DISK = Names(PER_EXPERT, "mixtral", "hf_mixtral", "model.layers.{l}.block_sparse_moe.")
IN_MEMORY = Names(FUSED, "hf_fused", "hf_mixtral_fused")


def read_mixture(settings: Settings) -> MoEConfig:
    """The contract of a layer's mixture."""
    return read_moe(
        presets.mixtral, settings, "intermediate_size",
        jitter_eps=settings.number("router_jitter_noise", 0.0),
    )


def write_mixture(moe: MoEConfig) -> dict[str, Any]:
    """And back."""
    return write_moe(moe, "num_local_experts", "intermediate_size") | {"router_jitter_noise": moe.router.jitter_eps}


def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract."""
    window, layers = settings.integer("sliding_window", None), settings.size("num_hidden_layers")
    sliding = {"sliding_window": window, "sliding_layers": () if window is None else tuple(range(layers))}
    return read_decoder(settings, moe, max_positions=131072, kv_heads=8, theta=1e6, norm_eps=1e-5, **sliding)


def write(config: DecoderConfig) -> dict[str, Any]:
    """config.json."""
    return write_decoder(config) | {"sliding_window": config.sliding_window}


def read_block(shapes: Shapes, chosen: dict[str, Any]) -> MoEConfig:
    """The contract of one layer's file: Hugging Face's MixtralSparseMoeBlock."""
    D, E = size_in(shapes, r"gate\.weight", 1), size_in(shapes, r"gate\.weight", 0)
    return presets.mixtral(D, size_in(shapes, r"experts\.\d+\.w1\.weight", 0), E, **chosen)


MIXTRAL = Family(
    "mixtral", Mixture(read_mixture, write_mixture, ON_DISK, IN_MEMORY), Whole("MixtralForCausalLM", read, write),
    StateDict(MoE, MoEConfig, ON_DISK.table, r"experts\.\d+\.w1\.weight", read_block, ("top_k",)),
)
