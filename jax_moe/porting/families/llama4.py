"""Llama 4's text model: attention in chunks, layers that turn nothing and grow their queries, mixtures in some."""

from dataclasses import replace
from typing import Any

from jax_moe.config.attention import GroupedAttentionConfig
from jax_moe.config.decoder import DecoderConfig, LayerConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.decoders import WHOLE
from jax_moe.porting.families.family import Whole, gated_ffn, read_decoder, write_decoder
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import under

CHUNKS = "chunked_attention"


def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract of a config.json."""
    layers, bias = settings.size("num_hidden_layers"), settings.flag("attention_bias", False)
    sparse = _mixtures(settings, layers)
    dense = tuple(i for i in range(layers) if i not in sparse)
    width = settings.integer("intermediate_size_mlp", 16384, least=1)
    base = read_decoder(
        settings, moe, kv_heads=8, null_kv_heads=False, head_dim=128, theta=5e5, max_positions=131072, norm_eps=1e-5,
        aux=None, qkv_bias=bias, output_bias=bias, dense_layers=dense, dense_dim=width if dense else 0,
    )
    turns = _turning(settings, layers)
    chunk = settings.integer("attention_chunk_size", 8192, null=None, least=1)
    chunked = _chunked(settings, turns, chunk is not None)
    normed, grows = settings.flag("use_qk_norm", True), settings.flag("attn_temperature_tuning", True)
    step, rate = settings.integer("floor_scale", 8192, least=1), settings.number("attn_scale", 0.1)

    def own(i: int, layer: LayerConfig) -> LayerConfig:
        attention = layer.attention
        assert isinstance(attention, GroupedAttentionConfig)
        attention = replace(attention, norm_eps=base.norm_eps, chunk=chunk if chunked[i] else None)
        if not turns[i]:
            growth: dict[str, Any] = {"temperature": rate, "temperature_step": step} if grows and rate else {}
            return replace(layer, attention=replace(attention, rope=None, **growth))
        norm: dict[str, Any] = {"qk_norm": "per_head", "qk_norm_place": "after_rope", "qk_norm_scale": False}
        assert attention.rope is not None
        rope = replace(attention.rope, pairs="neighbours", dtype="float32")
        return replace(layer, attention=replace(attention, rope=rope, **(norm if normed else {})))

    return replace(base, layers=tuple(own(i, layer) for i, layer in enumerate(base.layers)))


def _mixtures(settings: Settings, layers: int) -> set[int]:
    """moe_layers, or every interleave_moe_layer_step-th; a number beyond the last layer means nothing."""
    every = settings.integer("interleave_moe_layer_step", 1, least=1)
    if settings.values.get("moe_layers") is not None:
        return set(settings.integers("moe_layers")) & set(range(layers))
    return set(range(every - 1, layers, every))


def _turning(settings: Settings, layers: int) -> list[bool]:
    """Of each layer whether it turns queries and keys: no_rope_layers has a 1 for those that do, as transformers reads
    it; null or an empty list is all but every no_rope_layer_interval-th.
    """
    said, every = settings.integers("no_rope_layers"), settings.integer("no_rope_layer_interval", 4, least=1)
    if said and (len(said) != layers or not {0, 1}.issuperset(said)):
        settings.wrong("no_rope_layers", f"null or {layers} of 1 (turns) and 0")
        said = ()
    return [bool(entry) for entry in said] or [(i + 1) % every != 0 for i in range(layers)]


def _chunked(settings: Settings, turns: list[bool], some: bool) -> list[bool]:
    """Of each layer whether it sees its own chunk alone: layer_types, or those that turn."""
    named = settings.strings("layer_types")
    if named is None:
        return [some and entry for entry in turns]
    allowed = {WHOLE, CHUNKS} if some else {WHOLE}
    if len(named) != len(turns) or not allowed.issuperset(named):
        settings.wrong("layer_types", f"{len(turns)} of {', '.join(sorted(allowed))}", named)
        return [False for _ in turns]
    return [entry == CHUNKS for entry in named]


def write(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `read`."""
    attentions: list[Any] = [layer.attention for layer in config.layers]
    growing = [entry for entry in attentions if entry.temperature]
    written = write_decoder(config) | {
        "attention_bias": attentions[0].qkv_bias, "intermediate_size_mlp": config.dense_dim or 16384,
        "moe_layers": list(config.moe_layers), "no_rope_layers": [int(entry.rope is not None) for entry in attentions],
        "layer_types": [WHOLE if entry.chunk is None else CHUNKS for entry in attentions],
        "attention_chunk_size": next((entry.chunk for entry in attentions if entry.chunk is not None), None),
        "use_qk_norm": any(entry.qk_norm != "none" for entry in attentions), "attn_temperature_tuning": bool(growing),
    }
    if growing:
        written |= {"attn_scale": growing[0].temperature, "floor_scale": growing[0].temperature_step}
    del written["router_aux_loss_coef"]
    return written


LLAMA4 = Whole(
    "Llama4ForCausalLM", read, write, dense=under(gated_ffn("", ""), "feed_forward.", ""), order=(
        "self_attn.", "feed_forward.experts.", "feed_forward.router.", "feed_forward.", "input_layernorm.",
        "post_attention_layernorm.",
    ), inside=("", "language_model."),
)
