"""Contracts of attention: heads, rotation, norms."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jax_moe.config.checks import (
    LEAST,
    check_flags,
    check_literals,
    check_positive_ints,
    check_rates,
    check_within,
    is_int,
    is_number,
    require,
)

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "proportional", "longrope"]
Norm = Literal["none", "per_head", "full_width"]
NormKind = Literal["rms", "rms_wide", "rms_centered", "layer"]
NormOfHeads = Literal["before_rope", "after_rope"]
Pairs = Literal["halves", "neighbours"]
TurnedIn = Literal["input", "float32"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head attention. makeMoE divides scores by sqrt(model_dim), everyone else by sqrt(head_dim)."""

    model_dim: int
    num_heads: int
    projections: Literal["per_head", "fused"] = "per_head"  # stored apart (heads.0.key ...) or as one qkv map
    scale: Literal["head_dim", "model_dim"] = "head_dim"
    causal: bool = True
    dropout: float = 0.0  # on attention weights, and on the output projection

    def __post_init__(self) -> None:
        check_literals(self)
        check_flags(self, "causal")
        check_positive_ints(model_dim=self.model_dim, num_heads=self.num_heads)
        divides = self.model_dim % self.num_heads == 0
        require(divides, "num_heads", self.num_heads, f"a divisor of model_dim={self.model_dim}")
        check_rates(dropout=self.dropout)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def score_scale(self) -> float:
        return float(self.head_dim if self.scale == "head_dim" else self.model_dim) ** -0.5


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embeddings: the base and how the frequencies are stretched for longer texts."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0  # how many times longer texts may become; unused by "default"
    max_positions: int = 2048  # "dynamic" stretches beyond this length
    original_max_positions: int | None = None  # trained length before stretching; needed by these and "longrope"
    attention_factor: float | None = None  # "yarn": multiplies cos and sin; None: from factor and the two mscales
    beta_fast: float = 32.0  # "yarn": dims that turn more often than this in the trained length are unchanged
    beta_slow: float = 1.0  # "yarn": dims that turn less often are divided by factor
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # "yarn": whether the two bounds are rounded outwards to whole dims
    low_freq_factor: float = 1.0  # "llama3": wavelengths above original / low are divided by factor ...
    high_freq_factor: float = 4.0  # ... those below original / high are kept, the others interpolated
    # "longrope": what every pair's frequency is divided by, and cos and sin are multiplied with, in texts of at most
    # original_max_positions and in longer ones (arXiv 2402.13753; Phi-3.5-MoE)
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    short_mscale: float = 1.0
    long_mscale: float = 1.0
    pairs: Pairs = "halves"  # entries i and i + A/2, or 2i and 2i + 1 (Ernie 4.5)
    # Of cos, sin and their products with queries and keys: that of the tokens, or at least fp32, rounded after them
    # (transformers' DeepSeek-V2, Llama 4, Ernie 4.5 and FlexOlmo)
    dtype: TurnedIn = "input"
    # Of a head's entries, from the first: these are turned, the others pass (GLM-4.5). "proportional": of its pairs,
    # which are those of the whole head, at the whole head's frequencies (Gemma 4)
    fraction: float = 1.0

    def __post_init__(self) -> None:
        check_literals(self)
        check_positive_ints(max_positions=self.max_positions)
        check_flags(self, "truncate")
        share = is_number(self.fraction) and 0 < self.fraction <= 1
        require(share, "fraction", self.fraction, "a number above 0 and at most 1")
        check_within(1.0, factor=self.factor, theta=self.theta)
        require(self.theta > 1, "theta", self.theta, "above 1")
        check_within(LEAST, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        check_within(LEAST, low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        check_within(LEAST, optional=True, attention_factor=self.attention_factor)
        check_within(0.0, optional=True, mscale=self.mscale, mscale_all_dim=self.mscale_all_dim)
        check_within(LEAST, short_mscale=self.short_mscale, long_mscale=self.long_mscale)
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            fits = isinstance(factors, tuple) and all(is_number(one) and one > 0 for one in factors)
            require(fits, name, factors, "a tuple of numbers above 0")
        alike = len(self.long_factors) == len(self.short_factors)
        require(alike, "long_factors", self.long_factors, "as many as short_factors, one for each pair")
        if self.kind in ("yarn", "llama3", "longrope") or self.original_max_positions is not None:
            check_positive_ints(original_max_positions=self.original_max_positions)
        above = self.high_freq_factor > self.low_freq_factor
        require(above, "high_freq_factor", self.high_freq_factor, f"above low_freq_factor={self.low_freq_factor}")

    def width(self, head_dim: int) -> int:
        """How many entries of a head are turned."""
        return head_dim if self.kind == "proportional" else int(head_dim * self.fraction)

    def check_width(self, head_dim: int, name: str = "head_dim") -> None:
        """Raises ValueError for heads that cannot be turned so."""
        width = self.width(head_dim)
        if self.fraction != 1 and self.kind != "proportional":
            name += f" times rope.fraction={self.fraction:g}"
        require(width % 2 == 0 and width > 0, name, width, "even (rotary embeddings turn pairs)")
        stretched = self.kind not in ("dynamic", "yarn") or width > 2
        require(stretched, name, width, f"above 2 for rope kind {self.kind!r}")
        paired = self.kind != "longrope" or len(self.short_factors) == width // 2
        require(paired, name, width, f"twice the number of short_factors, {len(self.short_factors)}")

    def check_growth(self, length: int, more: int) -> None:
        """Raises ValueError if a text of so many tokens, growing by `more`, would be turned otherwise on the way: keys
        that were cached would be wrong.
        """
        most = self.original_max_positions
        if self.kind != "longrope" or most is None or length > most:
            return
        allowed = f"at most {most + 1 - length} after {length} tokens: rotary embeddings of kind 'longrope' turn texts "
        allowed += f"of more than original_max_positions={most} otherwise, from their first token on"
        require(length + more - 1 <= most, "max_new_tokens", more, allowed)  # the last token is not read

    def words(self) -> str:
        """The base, the share that turns, and the stretching where there is any."""
        whose = "pairs" if self.kind == "proportional" else "a head"
        part = "" if self.fraction == 1 else f" of the first {self.fraction:g} of {whose}"
        pairs = "" if self.pairs == "halves" else ", neighbours paired"
        wide = "" if self.dtype == "input" else ", in fp32"
        base = f"rotary{part}{pairs}{wide}, base {self.theta:,.0f}"
        trained = f" from {self.original_max_positions:,} positions" if self.original_max_positions else ""
        if self.kind == "longrope":
            return f"{base}, each pair by factors of its own, others beyond {self.original_max_positions:,} (longrope)"
        plain = self.kind == "default" or (self.kind == "proportional" and self.factor == 1)
        return base if plain else f"{base}, stretched {self.factor:g} times{trained} ({self.kind})"


def yarn_mscale(factor: float, weight: float) -> float:
    """0.1 * weight * ln(factor) + 1, or 1 where nothing is stretched (YaRN, arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """The contract of a decoder layer's attention. Each kind is a subclass; its module is in `attention.KINDS`."""

    kind: ClassVar[str] = ""

    model_dim: int

    @property
    def room(self) -> str:
        """The attribute of a decoder that stacks what layers of this kind have beside their feed-forward networks."""
        return f"blocks_{self.kind}"

    def stored(self) -> "LayerAttention":
        """The contract with only the fields that parameters depend on: layers that agree in them are stacked."""
        return self

    def sizes(self) -> dict[str, int]:
        """{name: size} of sizes that a wrong setting would make too large: at most the number of stored weights."""
        return {}

    def words(self) -> dict[str, list[str]]:
        """{subject: phrases} for `describe`."""
        return {"attention": [self.kind]}


@dataclass(frozen=True, kw_only=True)
class GroupedAttentionConfig(LayerAttention):
    """Grouped-query attention with rotary positions, as in the Hugging Face decoders."""

    kind: ClassVar[str] = "grouped"
    num_heads: int
    num_kv_heads: int  # each serves num_heads / num_kv_heads query heads
    head_dim: int  # may differ from model_dim / num_heads
    rope: RopeConfig | None = field(default_factory=RopeConfig)  # None: positions are known by the mask alone
    window: int | None = None  # a position sees itself and the window - 1 before it
    chunk: int | None = None  # a position sees its own chunk of so many, counted from the text's first (Llama 4)
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Norm = "none"  # RMSNorm of queries and keys: each head (Qwen3), or before the split into heads (OLMoE)
    qk_norm_place: NormOfHeads = "before_rope"  # after: HunYuan
    qk_norm_scale: bool = True  # these norms have a learned scale (False: Llama 4)
    qk_norm_wide: bool = False  # rounded after their scale (Gemma 4), not before
    qk_norm_centered: bool = False  # rounded after their scale, which is 1 + what is stored (Qwen3-Next)
    value_norm: bool = False  # RMSNorm of each head's values, without a scale (Gemma 4)
    value_from_key: bool = False  # values are the keys before norm and rotation: no map of their own (Gemma 4)
    output_gate: bool = False  # what every head found times sigmoid(x gate), before the output's map (Qwen3-Next)
    norm_eps: float = 1e-6  # of these norms
    clip_qkv: float | None = None  # queries, keys and values to within +- this (OLMoE)
    multiplier: float | None = None  # on q.k (None: head_dim**-0.5)
    sinks: bool = False  # a learned logit per head takes a share of every softmax and gives nothing (gpt-oss)
    temperature: float = 0.0  # queries times 1 + this * ln(1 + floor((position + 1) / temperature_step)) (Llama 4)
    temperature_step: int = 8192
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_literals(self)
        check_positive_ints(
            **{name: getattr(self, name) for name in ("model_dim", "num_heads", "num_kv_heads", "head_dim")}
        )
        heads = self.num_heads
        require(heads % self.num_kv_heads == 0, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={heads}")
        if self.rope is not None:
            self.rope.check_width(self.head_dim)
        window = self.window
        require(window is None or (is_int(window) and window >= 1), "sliding_window", window, "None or at least 1")
        chunk = self.chunk
        require(chunk is None or (is_int(chunk) and chunk >= 1), "chunk", chunk, "None or an integer of at least 1")
        require(chunk is None or window is None, "chunk", chunk, "None beside a window")
        check_flags(
            self, "qkv_bias", "output_bias", "sinks", "qk_norm_scale", "qk_norm_wide", "qk_norm_centered", "value_norm",
            "value_from_key", "output_gate",
        )
        both = self.qk_norm_wide and self.qk_norm_centered
        require(not both, "qk_norm_centered", self.qk_norm_centered, "False beside qk_norm_wide")
        plain = self.qk_norm_scale or self.qk_norm == "per_head"
        require(plain, "qk_norm_scale", self.qk_norm_scale, "True unless qk_norm='per_head'")
        check_positive_ints(temperature_step=self.temperature_step)
        check_rates(attention_dropout=self.dropout)
        check_within(0.0, temperature=self.temperature)
        check_within(LEAST, norm_eps=self.norm_eps)
        check_within(LEAST, optional=True, clip_qkv=self.clip_qkv, attention_multiplier=self.multiplier)

    @property
    def qk_norm_kind(self) -> NormKind:
        """How queries and keys are normed, where they are."""
        return "rms_centered" if self.qk_norm_centered else "rms_wide" if self.qk_norm_wide else "rms"

    @property
    def room(self) -> str:
        """The attribute that stacks layers had before there was another kind."""
        return "blocks"

    @property
    def score_scale(self) -> float:
        """The factor of q.k."""
        return self.head_dim**-0.5 if self.multiplier is None else self.multiplier

    def stored(self) -> "GroupedAttentionConfig":
        """The contract with only its heads, biases, sinks and norms."""
        plain: dict = {
            "rope": None, "window": None, "chunk": None, "clip_qkv": None, "multiplier": None, "temperature": 0.0,
            "temperature_step": 8192, "qk_norm_scale": True, "qk_norm_wide": False,
            "qk_norm_centered": False, "value_norm": False, "dropout": 0.0,
        }
        qk_norm = self.qk_norm if self.qk_norm_scale else "none"
        return dataclasses.replace(self, qk_norm=qk_norm, qk_norm_place="before_rope", **plain)

    def sizes(self) -> dict[str, int]:
        """The width of all heads."""
        return {"num_heads * head_dim": self.num_heads * self.head_dim}

    def words(self) -> dict[str, list[str]]:
        """Heads, scale, window, sinks, biases, norms, clipping; and the rotation."""
        H, J = self.num_heads, self.num_kv_heads
        biased = {"queries, keys and values": self.qkv_bias, "the output": self.output_bias}
        biases = [name for name, on in biased.items() if on]
        norms = {
            "per_head": "each head's queries and keys normed",
            "full_width": "queries and keys normed over their full width",
        }
        told = {
            f"{H} heads of width {self.head_dim}": True,
            "keys and values of their own" if H == J else f"each key and value head serving {H // J}": True,
            f"scores times {self.score_scale:.6g}": True,
            f"a window of {self.window or 0:,} positions": self.window is not None,
            f"chunks of {self.chunk or 0:,} positions": self.chunk is not None,
            "a learned logit per head in the softmax's denominator": self.sinks,
            f"biases on {' and '.join(biases)}": bool(biases),
            norms.get(self.qk_norm, "") + (" after they are turned" * (self.qk_norm_place == "after_rope"))
            + " without a scale" * (not self.qk_norm_scale): self.qk_norm in norms,
            "values normed without a scale": self.value_norm,
            "values that are the keys before norm and rotation": self.value_from_key,
            "a gate on what each head found": self.output_gate,
            f"queries growing by {self.temperature:g} every {self.temperature_step:,} positions": self.temperature > 0,
            f"queries, keys and values clipped to +-{self.clip_qkv or 0:g}": self.clip_qkv is not None,
        }
        positions = "none beside the mask" if self.rope is None else self.rope.words()
        return {"attention": [phrase for phrase, holds in told.items() if holds], "positions": [positions]}
