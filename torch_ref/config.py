"""The contract, shared with `jax_moe`: the same dataclasses, so that the two cannot differ."""

from jax_moe.config import (
    Activation,
    AttentionConfig,
    BalanceConfig,
    BlockConfig,
    CapacityConfig,
    ExpertConfig,
    MakeMoEConfig,
    MoEConfig,
    Priority,
    RouterConfig,
    SoftMoEConfig,
    require,
)

__all__ = [
    "Activation",
    "AttentionConfig",
    "BalanceConfig",
    "BlockConfig",
    "CapacityConfig",
    "ExpertConfig",
    "MakeMoEConfig",
    "MoEConfig",
    "Priority",
    "RouterConfig",
    "SoftMoEConfig",
    "require",
]
