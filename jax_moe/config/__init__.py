"""The contracts: frozen dataclasses that both frameworks read. Standard library only."""

from jax_moe.config.attention import AttentionConfig, GroupedAttentionConfig, LayerAttention, RopeConfig
from jax_moe.config.checks import require
from jax_moe.config.decoder import DecoderConfig, DenseConfig, LayerConfig
from jax_moe.config.latent import LatentAttentionConfig
from jax_moe.config.linear import LinearAttentionConfig
from jax_moe.config.models import BlockConfig, MakeMoEConfig, Origin
from jax_moe.config.moe import (
    Activation,
    AroundConfig,
    BalanceConfig,
    CapacityConfig,
    ExpertConfig,
    MixtureNorm,
    MoEConfig,
    Priority,
    RouterConfig,
    SoftMoEConfig,
)
from jax_moe.config.precision import PRECISIONS, Precision

__all__ = [
    "PRECISIONS",
    "Activation",
    "AroundConfig",
    "AttentionConfig",
    "BalanceConfig",
    "BlockConfig",
    "CapacityConfig",
    "DecoderConfig",
    "DenseConfig",
    "ExpertConfig",
    "GroupedAttentionConfig",
    "LatentAttentionConfig",
    "LayerAttention",
    "LayerConfig",
    "LinearAttentionConfig",
    "MakeMoEConfig",
    "MixtureNorm",
    "MoEConfig",
    "Origin",
    "Precision",
    "Priority",
    "RopeConfig",
    "RouterConfig",
    "SoftMoEConfig",
    "require",
]
