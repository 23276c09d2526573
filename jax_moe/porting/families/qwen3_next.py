"""Qwen3-Next and Qwen3.5: gated delta nets, and every fourth layer gated attention; all norms centred, of each head a
quarter turns.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from jax_moe.config.attention import GroupedAttentionConfig
from jax_moe.config.decoder import DecoderConfig, DenseConfig, LayerConfig
from jax_moe.config.linear import LinearAttentionConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.decoders import WHOLE
from jax_moe.porting.families.family import GROUPED, Whole, read_around, write_around
from jax_moe.porting.families.qwen2_moe import dense_layers, write_dense
from jax_moe.porting.families.rope_settings import read_rope, rope_object, write_rope
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row

LINEAR = "linear_attention"
# Sizes of the gated delta net: our field, its name in config.json, and what is taken where nothing is said
SIZES = {
    "num_key_heads": ("linear_num_key_heads", 16), "num_value_heads": ("linear_num_value_heads", 32),
    "key_dim": ("linear_key_head_dim", 128), "value_dim": ("linear_value_head_dim", 128),
    "taps": ("linear_conv_kernel_dim", 4),
}
SECTIONS = ("mrope_section", "mrope_interleaved")  # of text all three positions are the same, and so the sections


def read(dense: bool, settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract of a config.json; `dense`: of a family that may have layers without a mixture."""
    around = read_around(settings, max_positions=32768)
    types = _types(settings, settings.size("num_hidden_layers"))
    bias = settings.flag("attention_bias", False)
    whole = GroupedAttentionConfig(
        model_dim=around["model_dim"], num_heads=settings.size("num_attention_heads"),
        num_kv_heads=settings.integer("num_key_value_heads", 2, least=1),
        head_dim=settings.integer("head_dim", 256, least=1),
        rope=read_rope(_without_sections(settings), 1e4, around["max_positions"], 0.25),
        qkv_bias=bias, output_bias=bias, output_gate=True, qk_norm="per_head", qk_norm_centered=True,
        norm_eps=around["norm_eps"], dropout=settings.number("attention_dropout", 0.0),
    )
    linear = LinearAttentionConfig(
        model_dim=around["model_dim"], activation=settings.activation(), norm_eps=around["norm_eps"],
        **{ours: settings.integer(theirs, usual, least=1) for ours, (theirs, usual) in SIZES.items()},
    )
    without: dict[str, Any] = dense_layers(settings) if dense else {"dense_layers": (), "dense_dim": 0}
    beside = DenseConfig.beside(moe, without["dense_dim"]) if without["dense_layers"] else moe
    layers = tuple(
        LayerConfig(attention=linear if kind == LINEAR else whole, ffn=beside if i in without["dense_layers"] else moe)
        for i, kind in enumerate(types)
    )
    return DecoderConfig(layers=layers, norm="rms_centered", **around)


def _types(settings: Settings, layers: int) -> list[str]:
    """layer_types; where nothing is said every full_attention_interval-th layer sees all."""
    named = settings.strings("layer_types")
    if named is None:
        every = settings.integer("full_attention_interval", 4, least=1)
        return [LINEAR if (i + 1) % every else WHOLE for i in range(layers)]
    if len(named) != layers or not {LINEAR, WHOLE}.issuperset(named):
        settings.wrong("layer_types", f"{layers} of {WHOLE}, {LINEAR}", named)
    return named


def _without_sections(settings: Settings) -> Settings:
    """The settings without those of pictures' positions in the object of the rotation."""
    name, said = rope_object(settings)
    if not said:
        return settings
    rest = {key: value for key, value in said.items() if key not in SECTIONS}
    return Settings({**settings.values, name: rest}, settings.errors)


def write(dense: bool, config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `read`."""
    found: list[Any] = [layer.attention for layer in config.layers]
    whole = next((entry for entry in found if isinstance(entry, GroupedAttentionConfig)), None)
    linear = next((entry for entry in found if isinstance(entry, LinearAttentionConfig)), None)
    written = write_around(config) | {
        "layer_types": [LINEAR if isinstance(entry, LinearAttentionConfig) else WHOLE for entry in found]
    }
    if whole is not None:
        written |= {
            "num_attention_heads": whole.num_heads, "num_key_value_heads": whole.num_kv_heads,
            "head_dim": whole.head_dim, "attention_bias": whole.qkv_bias, "attention_dropout": whole.dropout,
        }
        if whole.rope is not None:
            written["rope_parameters"] = {"partial_rotary_factor": 1.0, **write_rope(whole.rope)}
    if linear is not None:
        written |= {theirs: getattr(linear, ours) for ours, (theirs, _) in SIZES.items()}
    return written | (write_dense(config) if dense else {})


def by_head(row: Row, part: str) -> Row:
    """The row of the queries, or that of their gate, of a map that has both for each head."""
    ours = row.ours if part == "0/2" else row.ours.replace("query", "gate")
    return replace(row, their_dims=row.their_dims.replace("(H A)", f"(H {part} A)"), ours=ours)


QUERIES = tuple(row for row in GROUPED if ".q_proj." in row.theirs)
GATED = tuple(by_head(row, part) for row in QUERIES for part in ("0/2", "1/2"))
ATTENTION = (*GATED, *(row for row in GROUPED if ".q_proj." not in row.theirs))


def delta(*maps: Row, last: tuple[Row, ...] = ()) -> tuple[Row, ...]:
    """The rows of a gated delta net, given those of its maps from the input, which Qwen3.5 numbers last."""
    channels, net = "J*A+J*A+J*O", "linear_attn."
    taps = (("query_taps", "A"), ("key_taps", "A"), ("value_taps", "O"))
    return (
        Row(f"{net}dt_bias", "(J G)", "attention.decay_bias", "J G"),
        Row(f"{net}A_log", "(J G)", "attention.decay_log", "J G"),
        *(
            Row(f"{net}conv1d.weight", f"{i}|{channels} 0/1 C", f"attention.{name}", f"J {width} C")
            for i, (name, width) in enumerate(taps)
        ),
        *maps,
        Row(f"{net}norm.weight", "M", "attention.out_norm.scale", "M"),
        Row(f"{net}out_proj.weight", "D (J O)", "attention.out", "J O D"),
        *last,
    )


def parts(theirs: str, dims: str, *named: tuple[str, str]) -> tuple[Row, ...]:
    """Rows of a map whose parts are ours, each (name, letter of its width); {i} in `dims` is the part's number."""
    return tuple(
        Row(f"linear_attn.{theirs}.weight", dims.replace("{i}", str(i)), f"attention.{name}", f"D J {width}")
        for i, (name, width) in enumerate(named)
    )


QUERY, KEY, VALUE, GATE = ("query", "A"), ("key", "A"), ("value", "O"), ("gate", "O")
BETA, DECAY = ("beta", "G"), ("decay", "G")
NEXT_MAPS = (
    *parts("in_proj_qkvz", "(J {i}|A+A+O+O) D", QUERY, KEY, VALUE, GATE),
    Row("linear_attn.in_proj_ba.weight", "(J 0/2 G) D", "attention.beta", "D J G"),
    Row("linear_attn.in_proj_ba.weight", "(J 1/2 G) D", "attention.decay", "D J G"),
)
SPLIT_MAPS = (
    *parts("in_proj_qkv", "{i}|J*A+J*A+J*O D", QUERY, KEY, VALUE), *parts("in_proj_z", "(J O) D", GATE),
    *parts("in_proj_b", "(J G) D", BETA), *parts("in_proj_a", "(J G) D", DECAY),
)
ORDER = ("linear_attn.", "self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.")
QWEN3_NEXT = Whole(
    "Qwen3NextForCausalLM", partial(read, True), partial(write, True),
    attention={"grouped": ATTENTION, "linear": delta(*NEXT_MAPS)}, order=ORDER, carried=("mtp.",),
)
QWEN3_5 = Whole(
    "Qwen3_5MoeForCausalLM", partial(read, False), partial(write, False),
    attention={"grouped": ATTENTION, "linear": delta(last=SPLIT_MAPS)}, order=ORDER, carried=("mtp.",),
    inside=("model.", "model.language_model."),
)
