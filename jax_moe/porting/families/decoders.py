"""Decoders of grouped-query attention as tables: parts that families share, each read from config.json and written.

A family is its parts, what transformers takes where config.json is silent, and the names of its weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from jax_moe.config.attention import GroupedAttentionConfig, RopeConfig
from jax_moe.config.checks import is_number
from jax_moe.config.decoder import DecoderConfig, LayerConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.family import AFTER as LAST
from jax_moe.porting.families.family import GROUPED, LAYER, NORMS, Whole, read_decoder, write_decoder
from jax_moe.porting.families.granitemoe import read as read_granite
from jax_moe.porting.families.granitemoe import write as write_granite
from jax_moe.porting.families.rope_settings import read_rope
from jax_moe.porting.families.settings import ROPE_KINDS, Settings
from jax_moe.porting.table.rows import Row

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


SLIDES, WHOLE = "sliding_attention", "full_attention"


def windows(types: Callable[[Settings, int], list[str]], window: int = 4096) -> Part:
    """layer_types, or what `types` says of so many layers; sliding_window holds in some of them."""

    def read(settings: Settings) -> dict[str, Any]:
        layers = settings.size("num_hidden_layers")
        named = settings.strings("layer_types")
        named = types(settings, layers) if named is None else named
        if len(named) != layers or not {SLIDES, WHOLE}.issuperset(named):
            settings.wrong("layer_types", f"{layers} of {WHOLE}, {SLIDES}", named)
        slides = tuple(i for i, kind in enumerate(named) if kind == SLIDES)
        return {
            "sliding_window": settings.integer("sliding_window", window, least=1) if slides else None,
            "sliding_layers": slides,
        }

    def write(config: DecoderConfig) -> dict[str, Any]:
        kinds = [SLIDES if i in config.sliding_layers else WHOLE for i in range(config.num_layers)]
        return {"layer_types": kinds, **({"sliding_window": config.sliding_window} if config.sliding_layers else {})}

    return Part(read, write)


def late_windows(settings: Settings, layers: int) -> list[str]:
    """Of the layers from max_window_layers on, if there is a window."""
    window = settings.integer("sliding_window", 4096, null=None)
    first = layers if window is None else settings.integer("max_window_layers", 62)
    return [SLIDES if i >= first else WHOLE for i in range(layers)]


def rotary_dim(settings: Settings) -> dict[str, Any]:
    """The share of a head that turns, as MiniMax-M2 was published: in entries."""
    entries, width = settings.integer("rotary_dim", None, least=1), settings.integer("head_dim", 128, least=1)
    return {} if entries is None else {"fraction": entries / width}


def by_pattern(settings: Settings, layers: int) -> list[str]:
    """Every fourth layer sees all, or every sliding_window_pattern-th."""
    every = settings.integer("sliding_window_pattern", 4, least=1)
    return [WHOLE if (i + 1) % every == 0 else SLIDES for i in range(layers)]


def by_turns(settings: Settings, layers: int) -> list[str]:
    """Every second layer sees all."""
    return [WHOLE if i % 2 else SLIDES for i in range(layers)]


# gpt-oss as published; transformers' where rope_parameters is absent or null
OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_oss_rope(settings: Settings) -> dict[str, Any]:
    """YaRN with bounds that are not rounded, where nothing else is said."""
    said = settings.values.get("rope_parameters")
    values = {**settings.values, "rope_parameters": OSS_ROPE if said is None else said}
    positions = settings.integer("max_position_embeddings", 131072)
    return {"rope": read_rope(Settings(values, settings.errors), 150000.0, positions)}


SPARSE, DENSE = "sparse", "dense"


def layer_kinds(silent: Callable[[Settings, int], list[str]]) -> Part:
    """mlp_layer_types, or what `silent` says of so many layers."""

    def read(settings: Settings) -> dict[str, Any]:
        types, layers = settings.strings("mlp_layer_types"), settings.size("num_hidden_layers")
        types = silent(settings, layers) if types is None else types
        if len(types) != layers or not {DENSE, SPARSE}.issuperset(types):
            settings.wrong("mlp_layer_types", f"{layers} of {DENSE}, {SPARSE}", types)
        dense = tuple(i for i, kind in enumerate(types) if kind == DENSE)
        return {"dense_layers": dense, "dense_dim": settings.size("intermediate_size") if dense else 0}

    def write(config: DecoderConfig) -> dict[str, Any]:
        types = [DENSE if i in config.dense_layers else SPARSE for i in range(config.num_layers)]
        return {"mlp_layer_types": types, "intermediate_size": config.dense_dim or config.moe.expert_dim}

    return Part(read, write)


def by_count(settings: Settings, layers: int) -> list[str]:
    """The first first_k_dense_replace layers are dense."""
    count = min(settings.integer("first_k_dense_replace", 1, least=0), layers)
    return [DENSE] * count + [SPARSE] * (layers - count)


def first_alone(settings: Settings, layers: int) -> list[str]:
    """The first layer alone is dense."""
    return [DENSE, *[SPARSE] * (layers - 1)]


def read_moe_range(settings: Settings) -> dict[str, Any]:
    """Ernie's: every so many layers have a mixture, from the first to the last that may."""
    layers, every = settings.size("num_hidden_layers"), settings.integer("moe_layer_interval", 1, least=1)
    first, last = settings.integer("moe_layer_start_index", 1), settings.integer("moe_layer_end_index", -1)
    last = layers - 1 if last == -1 else last
    dense = tuple(i for i in range(layers) if (i + 1) % every or not first <= i <= last)
    return {"dense_layers": dense, "dense_dim": settings.size("intermediate_size") if dense else 0}


def write_moe_range(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `read_moe_range`."""
    sparse = config.moe_layers
    steps = {b - a for a, b in pairwise(sparse)}
    return {
        "moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1],
        "moe_layer_interval": steps.pop() if steps else sparse[0] + 1,
        "intermediate_size": config.dense_dim or config.moe.expert_dim,
    }


def read_alpha(settings: Settings) -> dict[str, Any]:
    """HunYuan's fixed stretching: "dynamic" with alpha, which only changes the base."""
    given = next((found for name in ("rope_scaling", "rope_parameters") if (found := settings.values.get(name))), None)
    if not isinstance(given, dict) or not is_number(given.get("alpha")) or not given["alpha"]:
        return {}
    inner = Settings(given, settings.errors, "rope_scaling.")
    width = settings.integer("head_dim", 128, null=128, least=4)
    theta = inner.number("rope_theta", settings.number("rope_theta", 1e4))
    positions = settings.integer("max_position_embeddings", 2048)
    if inner.choice("rope_type" if "rope_type" in given else "type", "default", ROPE_KINDS) != "dynamic":
        return {}
    base = theta * inner.number("alpha", 1.0) ** (width / (width - 2))
    return {"rope": RopeConfig(theta=base, max_positions=positions)}


def without_rope(layer: LayerConfig) -> LayerConfig:
    """EXAONE's: a layer that sees all turns nothing."""
    attention = layer.attention
    if not isinstance(attention, GroupedAttentionConfig) or attention.window is not None:
        return layer
    return replace(layer, attention=replace(attention, rope=None))


def turned(**fields: Any) -> Callable[[LayerConfig], LayerConfig]:
    """What no setting says of the rotation."""

    def change(layer: LayerConfig) -> LayerConfig:
        attention = layer.attention
        assert isinstance(attention, GroupedAttentionConfig) and attention.rope is not None
        return replace(layer, attention=replace(attention, rope=replace(attention.rope, **fields)))

    return change


def grouped(
    architecture: str, *parts: Part, names: dict[str, Any] | None = None,
    change: Callable[[LayerConfig], LayerConfig] | None = None, **silent: Any,
) -> Whole:
    """A decoder of these parts, each layer changed so; `silent` are arguments of `read_decoder`, `names` further fields
    of `Whole`.
    """

    def read(settings: Settings, moe: MoEConfig) -> DecoderConfig:
        own = {name: value for part in parts for name, value in part.read(settings).items()}
        config = read_decoder(settings, moe, **silent | own)
        return config if change is None else config.with_layers(change)

    def write(config: DecoderConfig) -> dict[str, Any]:
        written = write_decoder(config)
        if silent.get("aux", 0) is None:
            del written["router_aux_loss_coef"]
        if silent.get("fraction") is not None and config.rope is not None:
            written["partial_rotary_factor"] = config.rope.fraction
        return written | {name: value for part in parts for name, value in part.write(config).items()}

    return Whole(architecture, read, write, **(names or {}))


GLM4 = grouped(
    "Glm4MoeForCausalLM", flag("attention_bias", "qkv_bias"), flag("use_qk_norm", "qk_norm", on="per_head", off="none"),
    first_dense(), kv_heads=8, null_kv_heads=False, max_positions=131072, norm_eps=1e-5, aux=None, fraction=0.5,
    names={"order": EXPERTS_FIRST, "carried": (LAYER,)},
)
PER_HEAD = always(qk_norm="per_head")
BIASES = flag("attention_bias", "qkv_bias", "output_bias")
DOTS1 = grouped(
    "Dots1ForCausalLM", BIASES, PER_HEAD, first_dense(0), windows(late_windows), kv_heads=32, aux=None,
    names={"order": EXPERTS_FIRST},
)
SOLAR = grouped(
    "SolarOpenForCausalLM", flag("attention_bias", "qkv_bias"), kv_heads=8, null_kv_heads=False, head_dim=128,
    theta=1e6, max_positions=131072, norm_eps=1e-5, aux=None, names={"order": EXPERTS_FIRST},
)
MINIMAX = grouped(
    "MiniMaxM2ForCausalLM", always(qk_norm="full_width"), Part(rotary_dim, lambda config: {}), kv_heads=8,
    null_kv_heads=False, head_dim=128, theta=5e6, max_positions=196608, fraction=1.0,
)
AFTER = (
    Row("post_attention_layernorm.weight", "D", "attention_out_norm.scale", "D"),
    Row("post_feedforward_layernorm.weight", "D", "ffn_out_norm.scale", "D"),
)
FLEX_OLMO = grouped(
    "FlexOlmoForCausalLM", BIASES, always(qk_norm="full_width", norm_place="after"), theta=5e5, max_positions=4096,
    aux=0.01, change=turned(dtype="float32"),
    names={"norms": AFTER, "order": ("self_attn.", "mlp.", *(row.theirs for row in AFTER))},
)
GRANITE_SHARED = Whole(
    "GraniteMoeSharedForCausalLM", read_granite, write_granite,
    order=("self_attn.", "input_layernorm.", "post_attention_layernorm.", "block_sparse_moe.", "shared_mlp."),
)
EXAONE = grouped(
    "ExaoneMoeForCausalLM", PER_HEAD, layer_kinds(by_count), windows(by_pattern), kv_heads=32,
    null_kv_heads=False, norm_eps=1e-5, aux=None, change=without_rope,
    names={"order": EXPERTS_FIRST, "carried": ("mtp.",)},
)
ERNIE = grouped(
    "Ernie4_5_MoeForCausalLM", always(attention_dropout=0.0), Part(read_moe_range, write_moe_range), kv_heads=4,
    theta=5e5, max_positions=131072, norm_eps=1e-5, tied=True, change=turned(pairs="neighbours", dtype="float32"),
    names={"carried": ("model.mtp_",)},
)
NORM_NAMES = {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}
HUNYUAN_ROWS = tuple(
    replace(row, theirs=row.theirs.replace(old, new)) for row in GROUPED
    for old, new in [next((pair for pair in NORM_NAMES.items() if pair[0] in row.theirs), ("", ""))]
)
HUNYUAN = grouped(
    "HunYuanMoEV1ForCausalLM", BIASES, always(qk_norm="per_head", qk_norm_place="after_rope"),
    Part(read_alpha, lambda config: {}), norm_eps=1e-5, aux=None, names={"attention": {"grouped": HUNYUAN_ROWS}},
)
GPT_OSS = grouped(
    "GptOssForCausalLM", flag("attention_bias", "qkv_bias", "output_bias", default=True),
    always(sinks=True, norm="rms_wide"), windows(by_turns, 128), Part(read_oss_rope, lambda config: {}), kv_heads=8,
    head_dim=64, max_positions=131072, norm_eps=1e-5,
    names={
        "attention": {"grouped": (*GROUPED, Row("self_attn.sinks", "H", "attention.sinks", "H"))},
        "order": (
            "self_attn.sinks", "self_attn.", "mlp.router.", "mlp.experts.gate_up_proj", "mlp.experts.",
            "input_layernorm.", "post_attention_layernorm.",
        ),
    },
)


def read_window(settings: Settings) -> dict[str, Any]:
    """One window, in all layers."""
    window, layers = settings.integer("sliding_window", None, least=1), settings.size("num_hidden_layers")
    return {"sliding_window": window, "sliding_layers": () if window is None else tuple(range(layers))}


def with_biases(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows of layer norms: each scale and, next to it, its bias."""
    return tuple(
        replace(row, theirs=row.theirs.replace(".weight", word), ours=row.ours.replace(".scale", ours))
        for row in rows for word, ours in ((".weight", ".scale"), (".bias", ".bias"))
    )


# transformers 5.24 turns long texts with the short factors and only exchanges mscale; as published, and here, they have
# the long factors (parity_tests/families/test_findings.py)
PHI = grouped(
    "PhimoeForCausalLM", BIASES, always(norm="layer"),
    Part(read_window, lambda config: {"sliding_window": config.sliding_window}),
    Part(
        lambda settings: {"head_bias": settings.flag("lm_head_bias", False)},
        lambda config: {"lm_head_bias": config.head_bias},
    ),
    kv_heads=8, null_kv_heads=False, theta=1e6, max_positions=131072, norm_eps=1e-5, kinds=("default", "longrope"),
    names={
        "norms": with_biases(NORMS),
        "after": (*with_biases(LAST[:1]), LAST[1], Row("lm_head.bias", "V", "head_bias", "V")),
    },
)
