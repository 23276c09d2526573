"""The contract of a decoder: attention, positions and layers around the mixture of `config.MoEConfig`.

Standard library only. What stands in a Hugging Face config.json, under this project's names and checked.
"""

import dataclasses
from dataclasses import dataclass, field

from jax_moe.config.attention import AttentionConfig, Norm, RopeConfig
from jax_moe.config.checks import (
    LEAST,
    check_above_zero,
    check_flags,
    check_literals,
    check_positive_ints,
    check_rates,
    check_within,
    is_int,
    require,
)
from jax_moe.config.moe import Activation, Dispatcher, MoEConfig, SoftMoEConfig, makemoe


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
        check_literals(self)
        sizes = ("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")
        check_positive_ints(**{name: getattr(self, name) for name in sizes})
        heads = self.num_heads
        require(heads % self.num_kv_heads == 0, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={heads}")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even (rotary embeddings turn pairs)")
        stretched = self.rope.kind not in ("dynamic", "yarn") or self.head_dim > 2
        require(stretched, "head_dim", self.head_dim, f"above 2 for rope kind {self.rope.kind!r}")
        require(self.moe.model_dim == self.model_dim, "moe.model_dim", self.moe.model_dim, f"model_dim={self.model_dim}")
        for name in ("dense_layers", "sliding_layers"):
            layers = getattr(self, name)
            require(isinstance(layers, tuple), name, layers, "a tuple of layer numbers")
            rising = list(layers) == sorted({i for i in layers if is_int(i) and 0 <= i < self.num_layers})
            require(rising, name, layers, f"rising layer numbers of 0 to {self.num_layers - 1}")
        require(len(self.dense_layers) < self.num_layers, "dense_layers", self.dense_layers, "fewer than all layers")
        dense = is_int(self.dense_dim) and (self.dense_dim > 0) == bool(self.dense_layers) and self.dense_dim >= 0
        require(dense, "dense_dim", self.dense_dim, "above 0 exactly when there are dense_layers")
        window = self.sliding_window
        require(window is None or (is_int(window) and window >= 1), "sliding_window", window, "None or at least 1")
        paired = (window is not None) == bool(self.sliding_layers)
        require(paired, "sliding_layers", self.sliding_layers, "set exactly when sliding_window is")
        check_flags(self, "qkv_bias", "output_bias", "tied_embeddings")
        check_rates(attention_dropout=self.attention_dropout)
        check_within(
            LEAST, norm_eps=self.norm_eps, embedding_multiplier=self.embedding_multiplier,
            residual_multiplier=self.residual_multiplier, logits_divisor=self.logits_divisor,
        )
        check_within(LEAST, optional=True, clip_qkv=self.clip_qkv, attention_multiplier=self.attention_multiplier)
        check_within(0.0, balance_loss_weight=self.balance_loss_weight)

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
        _ = self.block  # raises on what the parts refuse

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
    def moe(self) -> MoEConfig:
        moe = self.block.moe
        assert isinstance(moe, MoEConfig)
        return moe
