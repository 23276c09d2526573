"""Weights both ways: an engine over numpy arrays, and one table of rows a family."""

from jax_moe.porting.api import from_torch, from_torch_tree, to_torch
from jax_moe.porting.engine import PortError

__all__ = ["PortError", "from_torch", "from_torch_tree", "to_torch"]
