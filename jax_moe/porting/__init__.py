"""Weights both ways: an engine over numpy arrays, and one table of rows a family."""

from jax_moe.porting.errors import PortError
from jax_moe.porting.state_dict import from_torch, from_torch_tree, to_torch

__all__ = ["PortError", "from_torch", "from_torch_tree", "to_torch"]
