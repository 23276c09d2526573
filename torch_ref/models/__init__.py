"""Models, under the state-dict names of the original projects where these exist."""

from torch_ref.models.block import Block
from torch_ref.models.makemoe import MakeMoE, ModelOutput, Randomness
from torch_ref.models.mixtral_block import MixtralSparseMoeBlock

__all__ = ["Block", "MakeMoE", "MixtralSparseMoeBlock", "ModelOutput", "Randomness"]
