"""The contract of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from jax_moe.config.attention import LayerAttention, RopeConfig, yarn_mscale
from jax_moe.config.checks import LEAST, check_flags, check_positive_ints, check_rates, check_within, require

LATENT_NORM_EPS = 1e-6  # that of the reference, whatever the layer's own norms have


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(LayerAttention):
    """Keys and values of all heads from one compressed vector a token; one rotated key serves all heads.

    A head's queries and keys have `plain_dim` entries that do not turn and `rope_dim` that do.
    """

    kind: ClassVar[str] = "latent"
    num_heads: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    rank: int  # width of the compressed keys and values
    query_rank: int | None = None  # width of the compressed queries; None: they are not compressed
    rope: RopeConfig | None = field(default_factory=RopeConfig)  # None: nothing turns
    bias: bool = False  # on both compressions and the output
    norm_eps: float = LATENT_NORM_EPS  # of the compressed vectors' norms
    temperature: float = 0.0  # queries times 1 + this * ln(1 + floor(position / rope.original_max_positions)) (Llama 4)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        names = ("model_dim", "num_heads", "plain_dim", "rope_dim", "value_dim", "rank")
        check_positive_ints(**{name: getattr(self, name) for name in names})
        if self.query_rank is not None:
            check_positive_ints(query_rank=self.query_rank)
        if self.rope is not None:
            require(self.rope.fraction == 1, "rope.fraction", self.rope.fraction, "1: rope_dim says how much turns")
            self.rope.check_width(self.rope_dim, "rope_dim")
        check_flags(self, "bias")
        check_rates(attention_dropout=self.dropout)
        check_within(LEAST, norm_eps=self.norm_eps)
        check_within(0.0, temperature=self.temperature)
        counted = self.rope is not None and self.rope.original_max_positions is not None
        require(counted or not self.temperature, "temperature", self.temperature, "0 without original_max_positions")

    @property
    def head_dim(self) -> int:
        """The width of a head's queries and keys."""
        return self.plain_dim + self.rope_dim

    @property
    def score_scale(self) -> float:
        """The factor of q.k: head_dim**-0.5, times the square of YaRN's mscale of all dims where there is one."""
        rope, scale = self.rope, self.head_dim**-0.5
        if rope is None or rope.kind == "default" or not rope.mscale_all_dim:
            return scale
        return scale * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2

    def stored(self) -> "LatentAttentionConfig":
        """The contract with only its widths and biases."""
        return dataclasses.replace(self, rope=None, temperature=0.0, dropout=0.0)

    def sizes(self) -> dict[str, int]:
        """The widths of all heads, and of the compressed vectors."""
        H = self.num_heads
        return {
            "num_heads * head_dim": H * self.head_dim, "num_heads * value_dim": H * self.value_dim, "rank": self.rank,
            **({} if self.query_rank is None else {"query_rank": self.query_rank}),
        }

    def words(self) -> dict[str, list[str]]:
        """Heads, what is compressed, scale; and the rotation."""
        told = {
            f"{self.num_heads} heads of width {self.head_dim}, values of width {self.value_dim}": True,
            f"keys and values compressed to {self.rank}": True,
            f"queries compressed to {self.query_rank}": self.query_rank is not None,
            f"scores times {self.score_scale:.6g}": True,
            "biases on the compressions and the output": self.bias,
            f"queries growing with their position by {self.temperature:g}": self.temperature > 0,
        }
        positions = ["none beside the mask"]
        if self.rope is not None:
            positions = [self.rope.words(), f"{self.rope_dim} entries of a head turn"]
        return {"attention": [phrase for phrase, holds in told.items() if holds], "positions": positions}
