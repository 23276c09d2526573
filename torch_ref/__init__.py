"""Mixture of Experts in plain PyTorch: readable loops that compute what `jax_moe` computes in batches."""

from jax_moe import presets
from jax_moe.config import (
    PRECISIONS,
    AttentionConfig,
    BalanceConfig,
    BlockConfig,
    CapacityConfig,
    ExpertConfig,
    MakeMoEConfig,
    MoEConfig,
    Precision,
    RouterConfig,
    SoftMoEConfig,
)
from torch_ref.attention import Attention
from torch_ref.generation import generate
from torch_ref.losses import MoEStats, chosen_experts, next_token_loss, pool_balance_loss, tokens_per_expert
from torch_ref.models import Block, MakeMoE, MixtralSparseMoeBlock, ModelOutput, Randomness
from torch_ref.moe import MoE
from torch_ref.optimizers import clipped_step
from torch_ref.precision import call_in, cast_to_compute
from torch_ref.routing import Routing, update_correction_bias
from torch_ref.soft_moe import SoftMoE
from torch_ref.unchosen import skip_unchosen

__all__ = [
    "PRECISIONS",
    "Attention",
    "AttentionConfig",
    "BalanceConfig",
    "Block",
    "BlockConfig",
    "CapacityConfig",
    "ExpertConfig",
    "MakeMoE",
    "MakeMoEConfig",
    "MixtralSparseMoeBlock",
    "MoE",
    "MoEConfig",
    "MoEStats",
    "ModelOutput",
    "Precision",
    "Randomness",
    "RouterConfig",
    "Routing",
    "SoftMoE",
    "SoftMoEConfig",
    "call_in",
    "cast_to_compute",
    "chosen_experts",
    "clipped_step",
    "generate",
    "next_token_loss",
    "pool_balance_loss",
    "presets",
    "skip_unchosen",
    "tokens_per_expert",
    "update_correction_bias",
]
