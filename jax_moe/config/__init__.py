"""The contracts: frozen dataclasses that both frameworks read. Standard library only."""

from jax_moe.config.attention import AttentionConfig, RopeConfig
from jax_moe.config.checks import require
from jax_moe.config.models import BlockConfig, DecoderConfig, MakeMoEConfig, Origin
from jax_moe.config.moe import (
    Activation,
    BalanceConfig,
    CapacityConfig,
    ExpertConfig,
    MoEConfig,
    Priority,
    RouterConfig,
    SoftMoEConfig,
)
from jax_moe.config.precision import PRECISIONS, Precision

__all__ = [
    "PRECISIONS",
    "Activation",
    "AttentionConfig",
    "BalanceConfig",
    "BlockConfig",
    "CapacityConfig",
    "DecoderConfig",
    "ExpertConfig",
    "MakeMoEConfig",
    "MoEConfig",
    "Origin",
    "Precision",
    "Priority",
    "RopeConfig",
    "RouterConfig",
    "SoftMoEConfig",
    "require",
]
