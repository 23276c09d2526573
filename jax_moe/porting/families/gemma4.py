"""Gemma 4's text model: windows and whole texts by turns, each with heads, rotation and values of their own; around
every mixture the norms of its parts, in every layer a scale.
"""

from dataclasses import dataclass
from typing import Any

from jax_moe.config.attention import GroupedAttentionConfig, RopeConfig
from jax_moe.config.decoder import DecoderConfig, LayerConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.decoders import SLIDES, WHOLE
from jax_moe.porting.families.family import GROUPED, Whole, read_around, write_around
from jax_moe.porting.families.rope_settings import read_rope, write_rope
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row

ROPES = {
    SLIDES: {"rope_type": "default", "rope_theta": 10000.0},
    WHOLE: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


@dataclass(frozen=True)
class Heads:
    """What per_layer_config may give a layer of its own."""

    head_dim: int
    num_kv_heads: int


def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract of a config.json."""
    around = read_around(settings, max_positions=131072, norm_eps=1e-6, aux=None, tied=True)
    _refuse(settings)
    types = _types(settings, settings.size("num_hidden_layers"))
    heads = _heads(settings, types)
    ropes = {kind: _rope(settings, kind, around["max_positions"]) for kind in dict.fromkeys(types)}
    bias, shared = settings.flag("attention_bias", False), settings.flag("attention_k_eq_v", False)
    window = settings.integer("sliding_window", 512, least=1)

    def attention(kind: str, own: Heads) -> GroupedAttentionConfig:
        return GroupedAttentionConfig(
            model_dim=around["model_dim"], num_heads=settings.size("num_attention_heads"), head_dim=own.head_dim,
            num_kv_heads=own.num_kv_heads, rope=ropes[kind], window=window if kind == SLIDES else None, qkv_bias=bias,
            output_bias=bias, qk_norm="per_head", qk_norm_wide=True, value_norm=True,
            value_from_key=shared and kind == WHOLE, norm_eps=around["norm_eps"], multiplier=1.0,
            dropout=settings.number("attention_dropout", 0.0, null=0.0),
        )

    pairs = zip(types, heads, strict=True)
    layers = tuple(LayerConfig(attention=attention(kind, own), ffn=moe) for kind, own in pairs)
    return DecoderConfig(
        layers=layers, norm="rms_wide", norm_place="around_attention", layer_scale=True,
        embedding_multiplier=around["model_dim"] ** 0.5,
        logits_softcap=settings.number("final_logit_softcapping", None), **around,
    )


def _refuse(settings: Settings) -> None:
    """What other sizes of Gemma 4 have, and no published mixture."""
    width = settings.integer("hidden_size_per_layer_input", 256, null=0)
    if width:
        settings.errors.append(f"hidden_size_per_layer_input={width}: must be 0 (embeddings of each layer)")
    seen = settings.values.get("use_bidirectional_attention")
    if seen not in (None, "vision"):
        settings.wrong("use_bidirectional_attention", "null or 'vision' (a decoder sees what stands before)")


def _types(settings: Settings, layers: int) -> list[str]:
    """layer_types; where nothing is said every sixth layer sees all, and the last."""
    named = settings.strings("layer_types")
    if named is None:
        return [WHOLE if (i + 1) % 6 == 0 or i == layers - 1 else SLIDES for i in range(layers)]
    if len(named) != layers or not {SLIDES, WHOLE}.issuperset(named) or named[-1] != WHOLE:
        settings.wrong("layer_types", f"{layers} of {SLIDES}, {WHOLE}, the last {WHOLE}", named)
        return [WHOLE] * layers
    return named


def _heads(settings: Settings, types: list[str]) -> list[Heads]:
    """Of every layer: per_layer_config, or what is said of all that see everything."""
    plain = Heads(settings.integer("head_dim", 256, least=1), settings.integer("num_key_value_heads", 4, least=1))
    if "per_layer_config" in settings.values:  # null is an empty one: then nothing else speaks of single layers
        said, found = settings.values["per_layer_config"], []
        single = said if isinstance(said, dict) else {}
        for i in range(len(types)):
            own = Settings(single.get(str(i)) or {}, settings.errors, f"per_layer_config.{i}.")
            found.append(Heads(
                own.integer("head_dim", plain.head_dim, least=1),
                own.integer("num_key_value_heads", plain.num_kv_heads, least=1),
            ))
        for kind in dict.fromkeys(types):
            alike = {entry.head_dim for entry, other in zip(found, types, strict=True) if other == kind}
            if len(alike) > 1:
                settings.wrong("per_layer_config", f"of one head_dim in all layers of {kind}")
        return found
    width = settings.integer("global_head_dim", 512, least=1)
    number = settings.integer("num_global_key_value_heads", None, least=1)
    other = number is not None and settings.flag("attention_k_eq_v", False)
    whole = Heads(width, number if other else plain.num_kv_heads)
    return [whole if kind == WHOLE else plain for kind in types]


def _rope(settings: Settings, kind: str, max_positions: int) -> RopeConfig:
    """The rotation of layers of that kind, which rope_parameters has an object for."""
    said = settings.take("rope_parameters", dict, ROPES, ROPES)
    own = said.get(kind)
    if not isinstance(own, dict) or "rope_theta" not in own or "rope_type" not in own:
        settings.wrong("rope_parameters", f"an object with {kind}: rope_type and rope_theta")
        return RopeConfig()
    turned = own["rope_type"] == "proportional"
    inner = Settings({"rope_parameters": own}, settings.errors)
    return read_rope(inner, 1e4, max_positions, 1.0 if turned else None, ("default", "proportional"))


def write(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `read`."""
    found: list[Any] = [layer.attention for layer in config.layers]
    types = [WHOLE if entry.window is None else SLIDES for entry in found]
    first = found[0]
    plain = next((entry for entry in found if entry.window is not None), first)
    written = write_around(config) | {
        "num_attention_heads": first.num_heads, "attention_bias": first.qkv_bias, "attention_dropout": first.dropout,
        "num_key_value_heads": plain.num_kv_heads, "head_dim": plain.head_dim, "layer_types": types,
        "per_layer_config": {
            str(i): {"head_dim": entry.head_dim, "num_key_value_heads": entry.num_kv_heads}
            for i, entry in enumerate(found) if entry.window is None
        },
        "rope_parameters": {
            kind: write_rope(entry.rope) for kind, entry in zip(types, found, strict=True) if entry.rope is not None
        },
        "attention_k_eq_v": any(entry.value_from_key for entry in found), "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": config.logits_softcap, "num_kv_shared_layers": 0,
    }
    if plain.window is not None:
        written["sliding_window"] = plain.window
    del written["router_aux_loss_coef"]
    return written


NORMS = (
    Row("input_layernorm.weight", "D", "attention_norm.scale", "D"),
    Row("post_attention_layernorm.weight", "D", "attention_out_norm.scale", "D"),
    Row("post_feedforward_layernorm.weight", "D", "ffn_out_norm.scale", "D"),
    Row("layer_scalar", "1", "layer_scale", "1"),
)
BY_ORDER = ("q_proj", "q_norm", "k_norm", "k_proj", "v_proj", "o_proj")
ATTENTION = tuple(row for name in BY_ORDER for row in GROUPED if f".{name}." in row.theirs)
GEMMA4 = Whole(
    "Gemma4ForCausalLM", read, write, attention={"grouped": ATTENTION}, norms=NORMS, order=(
        "self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.", "pre_feedforward_layernorm.",
        "post_feedforward_layernorm.", "layer_scalar", "router.", "experts.", "post_feedforward_layernorm_1.",
        "post_feedforward_layernorm_2.", "pre_feedforward_layernorm_2.",
    ), inside=("model.", "model.language_model."),
)
