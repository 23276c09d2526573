"""Attention, one kind in a file."""

from jax_moe.attention.grouped import GroupedAttention
from jax_moe.attention.masks import visible_positions
from jax_moe.attention.multihead import Attention
from jax_moe.attention.rope import rotate, rotations

__all__ = ["Attention", "GroupedAttention", "rotate", "rotations", "visible_positions"]
