"""Decoders of latent attention: DeepSeek-V2 and V3 (also Kimi-K2), GLM-4.7-Flash, Mistral 4."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jax_moe.config.decoder import DecoderConfig, DenseConfig, LayerConfig
from jax_moe.config.latent import LatentAttentionConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.decoders import EXPERTS_FIRST, Part, first_dense, write_layer_types
from jax_moe.porting.families.family import LAYER, Whole, read_around, write_around
from jax_moe.porting.families.rope_settings import read_rope, write_rope
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.table.rows import Row

LATENT = (
    Row("self_attn.q_proj.weight", "(H A) D", "attention.query", "D H A"),
    Row("self_attn.q_a_proj.weight", "Q D", "attention.query_down", "D Q"),
    Row("self_attn.q_a_proj.bias", "Q", "attention.query_down_bias", "Q"),
    Row("self_attn.q_a_layernorm.weight", "Q", "attention.query_norm.scale", "Q"),
    Row("self_attn.q_b_proj.weight", "(H A) Q", "attention.query_up", "Q H A"),
    Row("self_attn.kv_a_proj_with_mqa.weight", "O D", "attention.down", "D O"),
    Row("self_attn.kv_a_proj_with_mqa.bias", "O", "attention.down_bias", "O"),
    Row("self_attn.kv_a_layernorm.weight", "Z", "attention.latent_norm.scale", "Z"),
    Row("self_attn.kv_b_proj.weight", "(H O) Z", "attention.up", "Z H O"),
    Row("self_attn.o_proj.weight", "D (H M)", "attention.out", "H M D"),
    Row("self_attn.o_proj.bias", "D", "attention.out_bias", "D"),
)
# Sizes of the attention: our field, and the name in config.json
WIDTHS = {
    "rank": "kv_lora_rank", "rope_dim": "qk_rope_head_dim", "plain_dim": "qk_nope_head_dim", "value_dim": "v_head_dim",
}


@dataclass(frozen=True)
class Silent:
    """What transformers takes where a family's config.json is silent, and how the family differs."""

    widths: dict[str, int]
    query_rank: int
    dense: Part
    max_positions: int
    norm_eps: float = 1e-6
    interleave: bool = True  # whether rope_interleave may say that halves are turned together
    temperature: bool = False  # whether queries grow with their position


def read(silent: Silent, settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract of a config.json."""
    around = read_around(settings, max_positions=silent.max_positions, norm_eps=silent.norm_eps, aux=None)
    layers, heads = settings.size("num_hidden_layers"), settings.size("num_attention_heads")
    settings.must_be("num_key_value_heads", heads, "keys and values have as many heads as queries")
    widths = {ours: settings.integer(theirs, silent.widths[ours], least=1) for ours, theirs in WIDTHS.items()}
    settings.must_be("mlp_bias", False, "dense layers have no biases")
    turned = widths["rope_dim"]
    head_dim = turned + widths["plain_dim"] if silent.temperature else turned
    settings.must_be("head_dim", head_dim, "it follows from qk_rope_head_dim and qk_nope_head_dim")
    rope, temperature = _rope(silent, settings, widths, around["max_positions"])
    attention = LatentAttentionConfig(
        model_dim=around["model_dim"], num_heads=heads, **widths, rope=rope, temperature=temperature,
        query_rank=settings.integer("q_lora_rank", silent.query_rank, null=None, least=1),
        bias=settings.flag("attention_bias", False), dropout=settings.number("attention_dropout", 0.0),
    )
    dense = silent.dense.read(settings)
    beside = DenseConfig.beside(moe, dense["dense_dim"]) if dense["dense_layers"] else moe
    ffns = (beside if i in dense["dense_layers"] else moe for i in range(layers))
    return DecoderConfig(layers=tuple(LayerConfig(attention=attention, ffn=ffn) for ffn in ffns), **around)


def _rope(silent: Silent, settings: Settings, widths: dict[str, int], max_positions: int) -> tuple[Any, float]:
    """The rotation of `rope_dim` entries, and how fast queries grow with their position."""
    values = dict(settings.values)
    name = next((n for n in ("rope_scaling", "rope_parameters") if isinstance(values.get(n), dict) and values[n]), None)
    if silent.temperature:
        name = name or "rope_parameters"
        inner = dict(settings.take(name, dict, {}, {}) or MISTRAL4_ROPE)
        share = widths["rope_dim"] / (widths["plain_dim"] + widths["rope_dim"])
        Settings(inner, settings.errors, f"{name}.").must_be("partial_rotary_factor", share, "the share of rope_dim")
        inner.pop("partial_rotary_factor", None)
        values[name] = inner
    rope = read_rope(Settings(values, settings.errors), 1e4, max_positions)
    if rope.kind not in ("default", "yarn") and name is not None:
        said = Settings(values[name], settings.errors, f"{name}.")
        said.must_be("mscale_all_dim", 0.0, "scores are scaled by it where rope_type is yarn")
    neighbours = settings.flag("rope_interleave", True) if silent.interleave else True
    rope = replace(rope, pairs="neighbours" if neighbours else "halves")
    if not silent.temperature:
        return rope, 0.0
    if "llama_4_scaling_beta" not in inner:
        settings.errors.append(f"{name}.llama_4_scaling_beta is missing")
    return rope, Settings(inner, settings.errors, f"{name}.").number("llama_4_scaling_beta", 0.0)


def write(silent: Silent, config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `read`."""
    attention = config.layers[0].attention
    if not isinstance(attention, LatentAttentionConfig):
        raise ValueError(f"layers: attention={attention.kind!r}: must be 'latent' in this family")
    written = write_around(config) | {
        "num_attention_heads": attention.num_heads, "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.query_rank, "attention_bias": attention.bias, "attention_dropout": attention.dropout,
        **{theirs: getattr(attention, ours) for ours, theirs in WIDTHS.items()}, **silent.dense.write(config),
    }
    del written["router_aux_loss_coef"]
    if attention.rope is not None:
        written["rope_parameters"] = write_rope(attention.rope)
        if silent.interleave:
            written["rope_interleave"] = attention.rope.pairs == "neighbours"
        if silent.temperature:
            written["rope_parameters"] |= {
                "llama_4_scaling_beta": attention.temperature,
                "partial_rotary_factor": attention.rope_dim / attention.head_dim,
            }
    return written


def read_types(settings: Settings) -> dict[str, Any]:
    """mlp_layer_types; without it the first layer alone has no mixture."""
    layers = settings.size("num_hidden_layers")
    types = settings.strings("mlp_layer_types")
    types = ["dense", *["sparse"] * (layers - 1)] if types is None else types
    if len(types) != layers or not {"dense", "sparse"}.issuperset(types):
        settings.errors.append(f"mlp_layer_types={types!r}: must be {layers} of dense, sparse")
    dense = tuple(i for i, kind in enumerate(types) if kind == "dense")
    return {"dense_layers": dense, "dense_dim": settings.size("intermediate_size") if dense else 0}


def latent(architecture: str, silent: Silent, also: tuple[str, ...] = ()) -> Whole:
    """A decoder of latent attention in every layer."""
    return Whole(
        architecture, partial(read, silent), partial(write, silent), attention={"latent": LATENT}, order=EXPERTS_FIRST,
        carried=(LAYER,), also=also,
    )


def widths(rank: int, rope_dim: int, plain_dim: int, value_dim: int) -> dict[str, int]:
    """Sizes by our fields."""
    return {"rank": rank, "rope_dim": rope_dim, "plain_dim": plain_dim, "value_dim": value_dim}


MISTRAL4_ROPE = {
    "type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "original_max_position_embeddings": 8192,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}
DEEPSEEK_V2 = latent(
    "DeepseekV2ForCausalLM", Silent(widths(512, 64, 128, 128), 1536, first_dense(0), 2048, interleave=False)
)
DEEPSEEK_V3 = latent(
    "DeepseekV3ForCausalLM", Silent(widths(512, 64, 128, 128), 1536, first_dense(3), 4096), also=("kimi_k2",)
)
GLM4_LITE = latent(
    "Glm4MoeLiteForCausalLM",
    Silent(widths(512, 64, 192, 256), 768, Part(read_types, write_layer_types), 202752, norm_eps=1e-5),
)
MISTRAL4 = latent(
    "Mistral4ForCausalLM", Silent(widths(256, 64, 64, 128), 1024, first_dense(0), 1048576, temperature=True)
)
