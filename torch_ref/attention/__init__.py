"""Attention, one kind in a file."""

from torch_ref.attention.multihead import Attention

__all__ = ["Attention"]
