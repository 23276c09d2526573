"""The contract of a decoder: attention, positions and layers around the mixture of `config.MoEConfig`.

Standard library only. What stands in a Hugging Face config.json, under this project's names and checked.
"""

from dataclasses import dataclass, field
from typing import Literal

from jax_moe.config import Activation, MoEConfig, _check_literals, _flags, _is_int, _is_number, _positive_int, _rate, require

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
Norm = Literal["none", "per_head", "full_width"]
LEAST, MOST = 1e-30, 1e30  # of a setting that must be above 0: fp32 holds it and its product with ordinary numbers


def _within(least: float, optional: bool = False, **values: object) -> None:
    for name, value in values.items():
        allowed = f"{'None or ' if optional else ''}a number of {least:g} to {MOST:g}"
        holds = (optional and value is None) or (_is_number(value) and least <= value <= MOST)
        require(holds, name, value, allowed)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embeddings: the base and how the frequencies are stretched for longer texts."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0  # how many times longer texts may become; unused by "default"
    max_positions: int = 2048  # "dynamic" stretches beyond this length
    original_max_positions: int | None = None  # trained length before stretching; needed by "yarn" and "llama3"
    attention_factor: float | None = None  # "yarn": multiplies cos and sin; None: from factor and the two mscales
    beta_fast: float = 32.0  # "yarn": dims that turn more often than this in the trained length stay as they are
    beta_slow: float = 1.0  # "yarn": dims that turn less often are divided by factor
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # "yarn": whether the two bounds are rounded outwards to whole dims
    low_freq_factor: float = 1.0  # "llama3": wavelengths above original / low are divided by factor ...
    high_freq_factor: float = 4.0  # ... those below original / high are kept, the others interpolated

    def __post_init__(self) -> None:
        _check_literals(self)
        _positive_int(max_positions=self.max_positions)
        _flags(self, "truncate")
        _within(1.0, factor=self.factor, theta=self.theta)
        require(self.theta > 1, "theta", self.theta, "above 1")
        _within(LEAST, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        _within(LEAST, low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        _within(LEAST, optional=True, attention_factor=self.attention_factor)
        _within(0.0, optional=True, mscale=self.mscale, mscale_all_dim=self.mscale_all_dim)
        if self.kind in ("yarn", "llama3") or self.original_max_positions is not None:
            _positive_int(original_max_positions=self.original_max_positions)
        above = self.high_freq_factor > self.low_freq_factor
        require(above, "high_freq_factor", self.high_freq_factor, f"above low_freq_factor={self.low_freq_factor}")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model: pre-norm blocks of grouped-query attention and a mixture of experts or one dense FFN."""

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # each serves num_heads / num_kv_heads query heads
    head_dim: int  # may differ from model_dim / num_heads
    moe: MoEConfig
    dense_layers: tuple[int, ...] = ()  # layers with one FFN instead of a mixture
    dense_dim: int = 0  # its width; set exactly when there are dense layers
    max_positions: int = 2048  # what the model was trained for; longer texts are not refused
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_window: int | None = None  # a position sees itself and the window - 1 before it
    sliding_layers: tuple[int, ...] = ()  # layers the window holds in; set exactly when there is one
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Norm = "none"  # RMSNorm of queries and keys: each head (Qwen3), or before the split into heads (OLMoE)
    clip_qkv: float | None = None  # queries, keys and values to within +- this (OLMoE)
    attention_dropout: float = 0.0
    tied_embeddings: bool = False  # the head is the transposed embedding
    embedding_multiplier: float = 1.0  # Granite's four: on the embeddings,
    attention_multiplier: float | None = None  # on q.k (None: head_dim**-0.5),
    residual_multiplier: float = 1.0  # on what each half of a block adds,
    logits_divisor: float = 1.0  # and under the logits
    balance_loss_weight: float = 0.001  # what training multiplies the balance loss with (router_aux_loss_coef)

    def __post_init__(self) -> None:
        _check_literals(self)
        sizes = ("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")
        _positive_int(**{name: getattr(self, name) for name in sizes})
        heads = self.num_heads
        require(heads % self.num_kv_heads == 0, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={heads}")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even (rotary embeddings turn pairs)")
        stretched = self.rope.kind not in ("dynamic", "yarn") or self.head_dim > 2
        require(stretched, "head_dim", self.head_dim, f"above 2 for rope kind {self.rope.kind!r}")
        require(self.moe.model_dim == self.model_dim, "moe.model_dim", self.moe.model_dim, f"model_dim={self.model_dim}")
        for name in ("dense_layers", "sliding_layers"):
            layers = getattr(self, name)
            require(isinstance(layers, tuple), name, layers, "a tuple of layer numbers")
            rising = list(layers) == sorted({i for i in layers if _is_int(i) and 0 <= i < self.num_layers})
            require(rising, name, layers, f"rising layer numbers of 0 to {self.num_layers - 1}")
        require(len(self.dense_layers) < self.num_layers, "dense_layers", self.dense_layers, "fewer than all layers")
        dense = _is_int(self.dense_dim) and (self.dense_dim > 0) == bool(self.dense_layers) and self.dense_dim >= 0
        require(dense, "dense_dim", self.dense_dim, "above 0 exactly when there are dense_layers")
        window = self.sliding_window
        require(window is None or (_is_int(window) and window >= 1), "sliding_window", window, "None or at least 1")
        paired = (window is not None) == bool(self.sliding_layers)
        require(paired, "sliding_layers", self.sliding_layers, "set exactly when sliding_window is")
        _flags(self, "qkv_bias", "output_bias", "tied_embeddings")
        _rate(attention_dropout=self.attention_dropout)
        _within(
            LEAST, norm_eps=self.norm_eps, embedding_multiplier=self.embedding_multiplier,
            residual_multiplier=self.residual_multiplier, logits_divisor=self.logits_divisor,
        )
        _within(LEAST, optional=True, clip_qkv=self.clip_qkv, attention_multiplier=self.attention_multiplier)
        _within(0.0, balance_loss_weight=self.balance_loss_weight)

    @property
    def score_scale(self) -> float:
        """What q.k is multiplied with."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with a mixture."""
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    @property
    def dense_activation(self) -> Activation:
        """Of the dense layers: that of the experts."""
        return self.moe.expert.activation


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a decoder was loaded from."""

    model_type: str
    config_json: str  # the text of its config.json
    directory: str
