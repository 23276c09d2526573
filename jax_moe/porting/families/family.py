"""What a Hugging Face family is, and what all of them share: rows of the decoder around the mixture, common settings."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jax_moe.config.decoder import DecoderConfig, differences
from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import MoEConfig, SoftMoEConfig
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.porting.families.rope_settings import read_rope, write_rope
from jax_moe.porting.families.settings import ACTIVATIONS, REFUSED, Settings
from jax_moe.porting.table.rows import Row, Table, stacked
from jax_moe.soft_moe import SoftMoE


@dataclass(frozen=True)
class Family:
    """One `model_type`: its contract from config.json, and back; its names, the first table being what it writes."""

    model_type: str
    architecture: str
    read: Callable[[Settings], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    tables: tuple[Table, ...]

    def config(self, values: Mapping[str, Any]) -> DecoderConfig:
        """The contract. Raises ValueError with everything that is missing, of a wrong type or not supported."""
        settings = Settings(values)
        settings.must_be("model_type", self.model_type, "the family")
        settings.must_be("quantization_config", {}, "quantised weights are not supported")
        settings.must_be("is_causal", True, "a decoder sees what stands before")
        settings.must_be("per_layer_config", {}, "settings of single layers are not supported")
        config = None
        try:
            config = self.read(settings)
        except ValueError as error:
            settings.errors.append(str(error))
        if settings.errors or config is None:
            raise ValueError("; ".join(dict.fromkeys(settings.errors)))
        return config

    def values(self, config: DecoderConfig) -> dict[str, Any]:
        """config.json of a contract. Raises ValueError if the family cannot say it."""
        values = {"architectures": [self.architecture], "model_type": self.model_type, **self.write(config)}
        again = self.config(values)
        if config != again:
            unsaid = ", ".join(differences(config, again))
            raise ValueError(f"{self.model_type}: must be a contract of that family; it cannot say {unsaid}")
        return values


LAYER = "model.layers.{l}."
_ATTENTION = (
    Row("input_layernorm.weight", "D", "attention_norm.scale", "D"),
    Row("post_attention_layernorm.weight", "D", "ffn_norm.scale", "D"),
    Row("self_attn.q_proj.weight", "(H A) D", "attention.query", "D H A"),
    Row("self_attn.q_proj.bias", "(H A)", "attention.query_bias", "H A"),
    Row("self_attn.k_proj.weight", "(J A) D", "attention.key", "D J A"),
    Row("self_attn.k_proj.bias", "(J A)", "attention.key_bias", "J A"),
    Row("self_attn.v_proj.weight", "(J A) D", "attention.value", "D J A"),
    Row("self_attn.v_proj.bias", "(J A)", "attention.value_bias", "J A"),
    Row("self_attn.o_proj.weight", "D (H A)", "attention.out", "H A D"),
    Row("self_attn.o_proj.bias", "D", "attention.out_bias", "D"),
    Row("self_attn.q_norm.weight", "W", "attention.query_norm.scale", "W"),
    Row("self_attn.k_norm.weight", "W", "attention.key_norm.scale", "W"),
)
OUTER = (
    Row("model.embed_tokens.weight", "V D", "embedding", "V D"),
    *stacked(_ATTENTION, "model.layers.{l}.", "blocks.", "l"),
    Row("model.norm.weight", "D", "final_norm.scale", "D"),
    Row("lm_head.weight", "V D", "head", "D V"),
)


def gated_ffn(theirs: str, ours: str) -> tuple[Row, ...]:
    """One FFN outside the mixture: `gate_proj`, `up_proj`, `down_proj`; ours holds it as one expert."""
    names = (("gate", "F D", "D F"), ("up", "F D", "D F"), ("down", "D F", "F D"))
    return tuple(Row(f"{theirs}{name}_proj.weight", a, f"{ours}{name}", f"0/1 {b}") for name, a, b in names)


def fused_experts(gate_up: str, down: str) -> tuple[Row, ...]:
    """All experts in two tensors: [E, 2F, D], the gates' rows first, and [E, D, F]."""
    return (
        Row(gate_up, "E (0/2 F) D", "experts.gate", "E D F"),
        Row(gate_up, "E (1/2 F) D", "experts.up", "E D F"),
        Row(down, "E D F", "experts.down", "E F D"),
    )


def decoder_table(name: str, mixture: tuple[Row, ...], within: str) -> Table:
    """The whole decoder; `mixture` are a layer's rows below `within`. `s` numbers layers with a mixture, `d` dense ones."""
    dense = stacked(gated_ffn("", ""), "model.layers.{d}.mlp.", "dense.", "d")
    return Table(name, (*OUTER, *stacked(mixture, f"model.layers.{{s}}.{within}.", "moe.", "s"), *dense))


def read_decoder(
    settings: Settings, moe: MoEConfig, *, max_positions: int = 2048, kv_heads: int | None = None, null_kv_heads: bool = True,
    theta: float = 10000.0, norm_eps: float = 1e-6, aux: float = 0.001, **own: Any,
) -> DecoderConfig:
    """What every family's config.json says in the same words; `own` are the family's fields. May raise ValueError.

    The others are what transformers takes where config.json is silent: `kv_heads` None is one for each query head, which null
    means too where `null_kv_heads`.
    """
    heads, width = settings.size("num_attention_heads"), settings.size("hidden_size")
    max_positions = settings.integer("max_position_embeddings", max_positions)
    null = heads if null_kv_heads else REFUSED
    head_dim = width // heads
    expert = dataclasses.replace(moe.expert, activation=settings.activation())
    return DecoderConfig.grouped(**{
        "vocab_size": settings.size("vocab_size"),
        "model_dim": width,
        "num_layers": settings.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": settings.integer("num_key_value_heads", kv_heads or heads, null=null),
        "head_dim": settings.integer("head_dim", head_dim, null=head_dim),
        "moe": dataclasses.replace(moe, expert=expert),
        "max_positions": max_positions,
        "rope": read_rope(settings, theta, max_positions),
        "norm_eps": settings.number("rms_norm_eps", norm_eps),
        "attention_dropout": settings.number("attention_dropout", 0.0),
        "tied_embeddings": settings.flag("tie_word_embeddings", False),
        "balance_loss_weight": settings.number("router_aux_loss_coef", aux),
    } | own)


def read_moe(make: Callable[..., MoEConfig], settings: Settings, width: str, **own: Any) -> MoEConfig:
    """A preset at this config.json's sizes; `width` is the family's name of an expert's width.

    The number of experts has two names, of which transformers takes one or both, by family: they must agree.
    """
    number, top_k = settings.size("num_local_experts", "num_experts"), settings.size("num_experts_per_tok")
    if top_k > number:
        settings.errors.append(f"num_experts_per_tok={top_k}: must be at most the number of experts, {number}")
    return make(settings.size("hidden_size"), settings.size(width), number, min(top_k, number), **own)


def write_decoder(config: DecoderConfig, experts: str, width: str) -> dict[str, Any]:
    """The reverse of `read_decoder` and `read_moe`; `experts` and `width` are the family's names of two sizes."""
    words = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.model_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions, "rope_parameters": write_rope(config.rope),
        "rms_norm_eps": config.norm_eps, "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tied_embeddings, "router_aux_loss_coef": config.balance_loss_weight,
        "hidden_act": words[config.moe.expert.activation], experts: config.moe.num_experts, width: config.moe.expert_dim,
        "num_experts_per_tok": config.moe.top_k,
    }


MODULES: dict[str, tuple[type[nnx.Module], type]] = {
    "decoder": (Decoder, DecoderConfig),  # a Hugging Face model, always stored by Orbax
    "makemoe": (MakeMoE, MakeMoEConfig),
    "makemoe_layer": (MoE, MoEConfig),
    "mixtral": (MoE, MoEConfig),
    "moe": (MoE, MoEConfig),
    "soft_moe": (SoftMoE, SoftMoEConfig),
    "switch": (MoE, MoEConfig),
}
