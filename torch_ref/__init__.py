"""Mixture of Experts in PyTorch, plain: what `jax_moe` does in batches, by loops that one can read."""

from jax_moe import presets
from jax_moe.config import AttentionConfig, BlockConfig, MakeMoEConfig, MoEConfig, SoftMoEConfig
from torch_ref.attention.multihead import Attention
from torch_ref.generation.generate import generate
from torch_ref.losses import MoEStats, chosen_experts
from torch_ref.models.block import Block, Randomness
from torch_ref.models.makemoe import MakeMoE
from torch_ref.models.mixtral_block import MixtralSparseMoeBlock
from torch_ref.moe import MoE
from torch_ref.precision import call_in, cast_to_compute
from torch_ref.routing import Routing
from torch_ref.soft_moe import SoftMoE
from torch_ref.unchosen import skip_unchosen

__all__ = [
    "Attention",
    "AttentionConfig",
    "Block",
    "BlockConfig",
    "MakeMoE",
    "MakeMoEConfig",
    "MixtralSparseMoeBlock",
    "MoE",
    "MoEConfig",
    "MoEStats",
    "Randomness",
    "Routing",
    "SoftMoE",
    "SoftMoEConfig",
    "call_in",
    "cast_to_compute",
    "chosen_experts",
    "generate",
    "presets",
    "skip_unchosen",
]
