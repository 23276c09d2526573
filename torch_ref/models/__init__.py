"""Models, under the state-dict names of the original projects where these exist."""

from torch_ref.models.block import Block, Randomness
from torch_ref.models.makemoe import MakeMoE
from torch_ref.models.mixtral_block import MixtralSparseMoeBlock

__all__ = ["Block", "MakeMoE", "MixtralSparseMoeBlock", "Randomness"]
