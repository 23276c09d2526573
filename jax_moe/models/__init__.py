"""Layers put together: a transformer block, makeMoE's language model and the decoder of the Hugging Face families."""

from jax_moe.models.block import Block
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE, Randomness
from jax_moe.models.stack import ModelOutput

__all__ = ["Block", "Decoder", "MakeMoE", "ModelOutput", "Randomness"]
