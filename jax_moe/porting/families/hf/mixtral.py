"""Mixtral (Hugging Face `mixtral`): w1 is the gate, w3 goes up, w2 down; the window, if any, holds in all layers."""

from typing import Any

from jax_moe import presets
from jax_moe.config.decoder import DecoderConfig
from jax_moe.porting.families import mixtral
from jax_moe.porting.families.family import Family, decoder_table, fused_experts, read_decoder, read_moe, write_decoder
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row


def read(settings: Settings) -> DecoderConfig:
    """The contract."""
    moe = read_moe(
        presets.mixtral, settings, "intermediate_size",
        jitter_eps=settings.number("router_jitter_noise", 0.0),
    )
    window, layers = settings.integer("sliding_window", None), settings.size("num_hidden_layers")
    sliding = {"sliding_window": window, "sliding_layers": () if window is None else tuple(range(layers))}
    return read_decoder(settings, moe, max_positions=131072, kv_heads=8, theta=1e6, norm_eps=1e-5, **sliding)


def write(config: DecoderConfig) -> dict[str, Any]:
    """config.json."""
    values = write_decoder(config, "num_local_experts", "intermediate_size")
    return values | {"sliding_window": config.sliding_window, "router_jitter_noise": config.moe.router.jitter_eps}


FUSED = (Row("gate.weight", "E D", "router.kernel", "D E"), *fused_experts("experts.gate_up_proj", "experts.down_proj"))
MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", read, write,
    (decoder_table("hf_mixtral", mixtral.ROWS, "block_sparse_moe"), decoder_table("hf_mixtral_fused", FUSED, "mlp")),
)
