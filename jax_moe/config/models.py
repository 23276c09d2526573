"""The contracts of blocks and of makeMoE, and where a decoder came from."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from jax_moe.config.attention import AttentionConfig
from jax_moe.config.checks import check_above_zero, check_flags, check_positive_ints, require
from jax_moe.config.decoder import DecoderConfig
from jax_moe.config.moe import Dispatcher, MoEConfig, SoftMoEConfig, makemoe

__all__ = ["BlockConfig", "DecoderConfig", "MakeMoEConfig", "Origin"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a decoder was loaded from."""

    model_type: str
    config_json: str  # the text of its config.json
    directory: str
    carried: tuple[str, ...] = ()  # tensors in it that the decoder does not use, written again when it is saved


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Pre-norm transformer block: x += attention(norm(x)); x += moe(norm(x))."""

    attention: AttentionConfig
    moe: MoEConfig | SoftMoEConfig
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        same = self.attention.model_dim == self.moe.model_dim
        check_above_zero(norm_eps=self.norm_eps)
        require(same, "model_dim", self.moe.model_dim, f"the attention's model_dim={self.attention.model_dim}")
        leaks = self.attention.causal and isinstance(self.moe, SoftMoEConfig)
        allowed = "a MoEConfig in a causal block: Soft MoE mixes every position into every other"
        require(not leaks, "moe", "SoftMoEConfig", allowed)
        if isinstance(self.moe, MoEConfig):
            self.moe.check_alone()

    def used(self, **arrays: Any) -> dict[str, Any]:
        """A sparse layer's arrays that are not None, by name. Raises ValueError for any if the mixture is soft."""
        given = {name: value for name, value in arrays.items() if value is not None}
        for name in given if isinstance(self.moe, SoftMoEConfig) else ():
            raise ValueError(f"{name}: must be left out; Soft MoE draws nothing and chooses no experts")
        return given


@dataclass(frozen=True, kw_only=True)
class MakeMoEConfig:
    """The character language model of makeMoE; the defaults are its published run (8,996,545 parameters)."""

    vocab_size: int = 65
    block_size: int = 32
    model_dim: int = 128
    num_heads: int = 8
    num_layers: int = 8
    num_experts: int = 8
    top_k: int = 2
    capacity_factor: float | None = 1.0  # None: dropless
    dropout: float = 0.1
    noise: bool = True  # the learned router noise; False: a plain top-k router
    dispatcher: Dispatcher = "auto"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "block_size", "model_dim", "num_heads", "num_layers", "num_experts", "top_k")
        check_positive_ints(**{name: getattr(self, name) for name in sizes})
        check_flags(self, "noise")
        _ = self.block  # raises ValueError for invalid parts

    @property
    def block(self) -> BlockConfig:
        attention = AttentionConfig(
            model_dim=self.model_dim, num_heads=self.num_heads, scale="model_dim", dropout=self.dropout
        )
        moe = makemoe(
            model_dim=self.model_dim, num_experts=self.num_experts, top_k=self.top_k,
            capacity_factor=self.capacity_factor, dropout=self.dropout, noise=self.noise,
        )
        return BlockConfig(attention=attention, moe=dataclasses.replace(moe, dispatcher=self.dispatcher))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with a mixture: all."""
        return tuple(range(self.num_layers))

    @property
    def moe(self) -> MoEConfig:
        moe = self.block.moe
        assert isinstance(moe, MoEConfig)
        return moe
