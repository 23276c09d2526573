"""The contract of a decoder: a contract per layer, and the settings around the layers.

Long because it also holds the flat settings of Hugging Face decoders, which convert to and from the layers.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from jax_moe.config.attention import GroupedAttentionConfig, LayerAttention, Norm, NormKind, NormOfHeads, RopeConfig
from jax_moe.config.checks import (
    LEAST,
    check_depth,
    check_flags,
    check_literals,
    check_positive_ints,
    check_within,
    is_int,
    require,
)
from jax_moe.config.moe import ExpertConfig, MoEConfig

NormPlace = Literal["before", "after", "around", "around_attention"]


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """The feed-forward network of a layer without a mixture: one expert that takes every token."""

    kind: ClassVar[str] = "dense"

    model_dim: int
    dim: int  # its width
    expert: ExpertConfig

    def __post_init__(self) -> None:
        check_positive_ints(model_dim=self.model_dim, dense_dim=self.dim)
        require(self.expert.shared_dim == 0, "expert.shared_dim", self.expert.shared_dim, "0 in a dense layer")

    @classmethod
    def beside(cls, moe: MoEConfig, dim: int) -> "DenseConfig":
        """A network of that width, with the activation and biases of the mixtures in other layers."""
        expert = dataclasses.replace(moe.expert, shared_dim=0, shared_gate=False, dropout=0.0, answer_norm="none")
        return cls(model_dim=moe.model_dim, dim=dim, expert=expert)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer: attention and a feed-forward network, each with its norms and inside a residual."""

    attention: LayerAttention
    ffn: MoEConfig | DenseConfig


class Stack(NamedTuple):
    """Layers whose parameters are stacked in one attribute of a decoder."""

    layers: tuple[int, ...]
    contract: Any  # of the first one's attention or feed-forward network


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model; `layers` has the contract of each."""

    vocab_size: int
    model_dim: int
    layers: tuple[LayerConfig, ...]
    max_positions: int = 2048  # the trained length; longer texts are not refused
    # "rms_wide": the scale is applied before the answer is rounded (gpt-oss); "rms_centered": so is 1 + what is stored
    norm: NormKind = "rms"
    # Each half of a layer: x + f(norm(x)), x + norm(f(x)), or both; "around_attention": both, but for the FFN
    # x + norm(f(x)) alone (Gemma 4, whose FFN norms what its parts read)
    norm_place: NormPlace = "before"
    norm_eps: float = 1e-6
    layer_scale: bool = False  # a stored number per layer, not trained, multiplies the stream after it (Gemma 4)
    logits_softcap: float | None = None  # logits c * tanh(logits / c) (Gemma 4: 30)
    tied_embeddings: bool = False  # the head is the transposed embedding
    head_bias: bool = False  # added to the logits (Phi-3.5-MoE)
    embedding_multiplier: float = 1.0  # multiplies the embeddings (Granite)
    residual_multiplier: float = 1.0  # multiplies what attention and FFN add to the residual stream (Granite)
    logits_divisor: float = 1.0  # divides the logits (Granite)
    balance_loss_weight: float = 0.001  # multiplies the balance loss in training (router_aux_loss_coef)

    def __post_init__(self) -> None:
        check_positive_ints(**{name: getattr(self, name) for name in ("vocab_size", "model_dim", "max_positions")})
        layers = self.layers
        some = isinstance(layers, tuple) and layers and all(isinstance(layer, LayerConfig) for layer in layers)
        require(bool(some), "layers", type(layers).__name__, "a tuple of at least one LayerConfig")
        for layer in dict.fromkeys(layers):
            for name, part in (("attention", layer.attention), ("moe", layer.ffn)):
                require(
                    part.model_dim == self.model_dim, f"{name}.model_dim", part.model_dim, f"model_dim={self.model_dim}"
                )
        require(bool(self.moe_layers), "dense_layers", self.dense_layers, "fewer than all layers")
        for moe in dict.fromkeys(self.mixtures):
            moe.check_alone()
        sizes = {(moe.num_experts, moe.top_k) for moe in self.mixtures}
        require(len(sizes) == 1, "layers", sorted(sizes), "of one num_experts and top_k: their statistics are stacked")
        check_literals(self)
        check_flags(self, "tied_embeddings", "layer_scale", "head_bias")
        check_within(LEAST, optional=True, logits_softcap=self.logits_softcap)
        check_within(
            LEAST, norm_eps=self.norm_eps, embedding_multiplier=self.embedding_multiplier,
            residual_multiplier=self.residual_multiplier, logits_divisor=self.logits_divisor,
        )
        check_within(0.0, balance_loss_weight=self.balance_loss_weight)

    @classmethod
    def grouped(cls, **settings: Any) -> "DecoderConfig":
        """A decoder of grouped-query attention, from the settings of `GroupedDecoder`, with its ValueErrors."""
        return GroupedDecoder(**settings).config()

    def with_layers(self, change: Callable[[LayerConfig], LayerConfig]) -> "DecoderConfig":
        """The same decoder with every layer changed."""
        return dataclasses.replace(self, layers=tuple(map(change, self.layers)))

    def with_attention(self, **changes: Any) -> "DecoderConfig":
        """The same decoder with these fields changed in the attention of every layer that has them.

        Raises TypeError for a field that no layer has.
        """
        for name in changes:
            if not any(hasattr(layer.attention, name) for layer in self.layers):
                raise TypeError(f"{name}: must be a field of some layer's attention")

        def changed(layer: LayerConfig) -> LayerConfig:
            own = {name: value for name, value in changes.items() if hasattr(layer.attention, name)}
            return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **own))

        return self.with_layers(changed)

    def with_moe(self, moe: MoEConfig) -> "DecoderConfig":
        """The same decoder with this mixture in every layer that has one."""
        def change(layer: LayerConfig) -> LayerConfig:
            return dataclasses.replace(layer, ffn=moe) if isinstance(layer.ffn, MoEConfig) else layer

        return self.with_layers(change)

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """{attribute of the decoder: what is stacked in it}, in the order attention, mixtures, dense networks.

        "blocks" (grouped attention and the norms), "blocks_KIND" of another kind, "moe", "dense"; if parameters of a
        kind differ, "blocks_2" and so on.
        """
        names: dict[tuple[str, Any], str] = {}
        found: dict[str, tuple[list[int], Any]] = {}
        attention = [(i, layer.attention) for i, layer in enumerate(self.layers)]
        for i, part in (*attention, *((i, self.layers[i].ffn) for i in (*self.moe_layers, *self.dense_layers))):
            room, stored = (part.room, part.stored()) if isinstance(part, LayerAttention) else (part.kind, part)
            number = sum(other == room for other, _ in names)
            name = names.setdefault((room, stored), room if number == 0 else f"{room}_{number + 1}")
            found.setdefault(name, ([], part))[0].append(i)
        return {name: Stack(tuple(layers), part) for name, (layers, part) in found.items()}

    def stacks_of(self, layer: int) -> tuple[str, str]:
        """The names of the two stacks that a layer is in: of its attention, and of its feed-forward network."""
        attention, ffn = (name for name, stack in self.stacks.items() if layer in stack.layers)
        return attention, ffn

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with a mixture."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.ffn, MoEConfig))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers without a mixture."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.ffn, DenseConfig))

    @property
    def mixtures(self) -> tuple[MoEConfig, ...]:
        """The contract of every mixture, layer by layer."""
        return tuple(layer.ffn for layer in self.layers if isinstance(layer.ffn, MoEConfig))

    @property
    def moe(self) -> MoEConfig:
        """The contract of the first mixture; in most decoders all have the same."""
        return self.mixtures[0]

    @property
    def dense_dim(self) -> int:
        """The width of the first dense layer; 0 if there is none."""
        return next((layer.ffn.dim for layer in self.layers if isinstance(layer.ffn, DenseConfig)), 0)

    @property
    def attention(self) -> GroupedAttentionConfig:
        """The contract of the first layer with grouped attention; in most decoders only the window differs by layer."""
        found = (layer.attention for layer in self.layers if isinstance(layer.attention, GroupedAttentionConfig))
        first = next(found, None)
        if first is None:
            raise AttributeError("no layer of this decoder has grouped attention")
        return first

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim

    @property
    def rope(self) -> RopeConfig | None:
        """Of the first layer that turns its queries and keys; None if none does."""
        ropes = (getattr(layer.attention, "rope", None) for layer in self.layers)
        return next((rope for rope in ropes if rope is not None), None)

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """The layers with a window."""
        return tuple(i for i, layer in enumerate(self.layers) if getattr(layer.attention, "window", None) is not None)

    @property
    def sliding_window(self) -> int | None:
        """The window of the first layer that has one; None without."""
        windows = (getattr(layer.attention, "window", None) for layer in self.layers)
        return next((window for window in windows if window is not None), None)

    @cached_property
    def shorthand(self) -> "GroupedDecoder | None":
        """The settings for `grouped` that make this decoder; None if its layers differ in more than these express."""
        if not all(isinstance(layer.attention, GroupedAttentionConfig) for layer in self.layers):
            return None
        own = {ours: getattr(self.attention, name) for ours, name in ATTENTION_FIELDS.items()}
        layers = {
            name: getattr(self, name) for name in ("dense_layers", "dense_dim", "sliding_layers", "sliding_window")
        }
        alike = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "layers"}
        found = GroupedDecoder(num_layers=self.num_layers, moe=self.moe, **own, **layers, **alike)
        return found if found.config() == self else None


# Fields of `GroupedDecoder` that belong to the attention, and their names in its contract
ATTENTION_FIELDS = {
    "num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "head_dim": "head_dim", "rope": "rope",
    "qkv_bias": "qkv_bias", "output_bias": "output_bias", "qk_norm": "qk_norm", "qk_norm_place": "qk_norm_place",
    "clip_qkv": "clip_qkv", "sinks": "sinks",
    "attention_dropout": "dropout",
    "attention_multiplier": "multiplier",
}


@dataclass(frozen=True, kw_only=True)
class GroupedDecoder:
    """The settings of a Hugging Face config.json in one flat object: grouped attention in all layers, and one contract
    for all mixtures.

    Folders store it in place of `layers` if it gives the same decoder.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    moe: MoEConfig
    dense_layers: tuple[int, ...] = ()  # layers with one FFN instead of a mixture
    dense_dim: int = 0  # its width; set exactly when there are dense layers
    max_positions: int = 2048
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()  # layers the window holds in; set exactly when there is one
    norm: NormKind = "rms"
    norm_place: NormPlace = "before"
    norm_eps: float = 1e-6
    layer_scale: bool = False
    logits_softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Norm = "none"
    qk_norm_place: NormOfHeads = "before_rope"
    clip_qkv: float | None = None
    sinks: bool = False
    attention_dropout: float = 0.0
    tied_embeddings: bool = False
    head_bias: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    balance_loss_weight: float = 0.001

    def config(self) -> DecoderConfig:
        """The decoder, layer by layer. Raises ValueError, by name, for what does not fit together."""
        check_depth(num_layers=self.num_layers)
        for name in ("dense_layers", "sliding_layers"):
            layers = getattr(self, name)
            require(isinstance(layers, tuple), name, layers, "a tuple of layer numbers")
            rising = list(layers) == sorted({i for i in layers if is_int(i) and 0 <= i < self.num_layers})
            require(rising, name, layers, f"rising layer numbers of 0 to {self.num_layers - 1}")
        dense = is_int(self.dense_dim) and (self.dense_dim > 0) == bool(self.dense_layers) and self.dense_dim >= 0
        require(dense, "dense_dim", self.dense_dim, "above 0 exactly when there are dense_layers")
        paired = (self.sliding_window is not None) == bool(self.sliding_layers)
        require(paired, "sliding_layers", self.sliding_layers, "set exactly when sliding_window is")
        own = {name: getattr(self, ours) for ours, name in ATTENTION_FIELDS.items()}
        whole = GroupedAttentionConfig(model_dim=self.model_dim, norm_eps=self.norm_eps, **own)
        sliding = dataclasses.replace(whole, window=self.sliding_window)
        without = DenseConfig.beside(self.moe, self.dense_dim) if self.dense_layers else self.moe
        layers = tuple(
            LayerConfig(
                attention=sliding if i in self.sliding_layers else whole,
                ffn=without if i in self.dense_layers else self.moe,
            )
            for i in range(self.num_layers)
        )
        names = [field.name for field in dataclasses.fields(DecoderConfig) if field.name != "layers"]
        alike = {name: getattr(self, name) for name in names}
        return DecoderConfig(layers=layers, **alike)


def differences(first: DecoderConfig, second: DecoderConfig) -> list[str]:
    """The fields in which two decoders differ: those of the shorthand if both have it."""
    short = first.shorthand, second.shorthand
    pair: Any = (first, second) if None in short else short
    names = [field.name for field in dataclasses.fields(pair[0])]
    return [name for name in names if getattr(pair[0], name) != getattr(pair[1], name)]
