"""The contract of the gated delta net, an attention of linear cost (arXiv 2412.06464; Qwen3-Next, Qwen3.5)."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from jax_moe.config.attention import LayerAttention
from jax_moe.config.checks import LEAST, check_literals, check_positive_ints, check_within, require
from jax_moe.config.moe import Activation


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(LayerAttention):
    """A state [key width, value width] of every value head, which forgets, and is corrected by each token.

    Positions are known by the order of the tokens alone.
    """

    kind: ClassVar[str] = "linear"
    num_key_heads: int  # of queries and keys
    num_value_heads: int  # of values, decays and states; each key head serves num_value_heads / num_key_heads
    key_dim: int
    value_dim: int
    taps: int = 4  # of the convolution before the heads: a token and the taps - 1 before it
    activation: Activation = "silu"  # after the convolution; the gate of the answer is a silu always
    norm_eps: float = 1e-6  # of the answer's norm

    def __post_init__(self) -> None:
        check_literals(self)
        names = ("model_dim", "num_key_heads", "num_value_heads", "key_dim", "value_dim", "taps")
        check_positive_ints(**{name: getattr(self, name) for name in names})
        heads, value_heads = self.num_key_heads, self.num_value_heads
        require(value_heads % heads == 0, "num_value_heads", value_heads, f"a multiple of num_key_heads={heads}")
        check_within(LEAST, norm_eps=self.norm_eps)

    @property
    def served(self) -> int:
        """How many value heads a key head serves."""
        return self.num_value_heads // self.num_key_heads

    def stored(self) -> "LinearAttentionConfig":
        """The contract with only its widths."""
        return dataclasses.replace(self, activation="silu")

    def sizes(self) -> dict[str, int]:
        """The widths of all heads, and of the convolution."""
        return {
            "num_key_heads * key_dim": self.num_key_heads * self.key_dim,
            "num_value_heads * value_dim": self.num_value_heads * self.value_dim, "taps": self.taps,
        }

    def words(self) -> dict[str, list[str]]:
        """Heads, the convolution, the state."""
        served = self.served
        told = {
            "gated delta net": True,
            f"{self.num_key_heads} key heads of width {self.key_dim}": True,
            f"each serving {served} of {self.num_value_heads} value heads of width {self.value_dim}": True,
            f"a convolution over {self.taps} tokens with {self.activation}": True,
        }
        return {"attention": [phrase for phrase, holds in told.items() if holds], "positions": ["their order alone"]}
