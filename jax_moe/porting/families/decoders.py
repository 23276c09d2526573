"""Decoders of grouped-query attention as tables: parts that families share, each read from config.json and written.

A family is its parts, what transformers takes where config.json is silent, and the names of its weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax_moe.config.decoder import DecoderConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.family import Whole, read_decoder, write_decoder
from jax_moe.porting.families.settings import Settings

# Experts are made before the router, and stand so among the reference's parameters.
EXPERTS_FIRST = ("self_attn.", "mlp.experts.", "mlp.", "input_layernorm.", "post_attention_layernorm.")


@dataclass(frozen=True)
class Part:
    """Settings of config.json, and the fields of `GroupedDecoder` that they say."""

    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]


def flag(theirs: str, *ours: str, on: Any = True, off: Any = False, default: bool = False) -> Part:
    """A switch of the attention: fields that are `on` or `off`."""

    def read(settings: Settings) -> dict[str, Any]:
        return dict.fromkeys(ours, on if settings.flag(theirs, default) else off)

    return Part(read, lambda config: {theirs: getattr(config.attention, ours[0]) == on})


def always(**fields: Any) -> Part:
    """What no setting says."""
    return Part(lambda settings: fields, lambda config: {})


def first_dense(default: int = 1) -> Part:
    """first_k_dense_replace: so many layers have no mixture."""

    def read(settings: Settings) -> dict[str, Any]:
        layers = settings.size("num_hidden_layers")
        count = settings.integer("first_k_dense_replace", default, least=0)
        dense = tuple(range(min(count, layers)))
        return {"dense_layers": dense, "dense_dim": settings.size("intermediate_size") if dense else 0}

    def write(config: DecoderConfig) -> dict[str, Any]:
        return {
            "first_k_dense_replace": len(config.dense_layers),
            "intermediate_size": config.dense_dim or config.moe.expert_dim,
        }

    return Part(read, write)


def grouped(architecture: str, *parts: Part, names: dict[str, Any] | None = None, **silent: Any) -> Whole:
    """A decoder of these parts; `silent` are arguments of `read_decoder`, `names` further fields of `Whole`."""

    def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
        own = {name: value for part in parts for name, value in part.read(settings).items()}
        return read_decoder(settings, moe, **silent, **own)

    def write(config: DecoderConfig) -> dict[str, Any]:
        written = write_decoder(config)
        if silent.get("aux", 0) is None:
            del written["router_aux_loss_coef"]
        if silent.get("fraction") is not None:
            written["partial_rotary_factor"] = config.rope.fraction
        return written | {name: value for part in parts for name, value in part.write(config).items()}

    return Whole(architecture, read, write, **(names or {}))


GLM4 = grouped(
    "Glm4MoeForCausalLM", flag("attention_bias", "qkv_bias"), flag("use_qk_norm", "qk_norm", on="per_head", off="none"),
    first_dense(), kv_heads=8, null_kv_heads=False, max_positions=131072, norm_eps=1e-5, aux=None, fraction=0.5,
    names={"order": EXPERTS_FIRST},
)
