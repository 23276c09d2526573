"""Decoders of latent attention: DeepSeek-V2 and V3 (also Kimi-K2), GLM-4.7-Flash, Mistral 4."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jax_moe.config.attention import RopeConfig, TurnedIn
from jax_moe.config.decoder import DecoderConfig, DenseConfig, LayerConfig
from jax_moe.config.latent import LatentAttentionConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.decoders import EXPERTS_FIRST, Part, first_alone, first_dense, layer_kinds
from jax_moe.porting.families.family import LAYER, Whole, read_around, write_around
from jax_moe.porting.families.rope_settings import read_rope, rope_object, write_rope
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
    turned_in: TurnedIn = "input"


def read(silent: Silent, settings: Settings, moe: MoEConfig) -> DecoderConfig:
    """The contract of a config.json."""
    around = read_around(settings, max_positions=silent.max_positions, norm_eps=silent.norm_eps, aux=None)
    layers, heads = settings.size("num_hidden_layers"), settings.size("num_attention_heads")
    settings.must_be("num_key_value_heads", heads, "keys and values have as many heads as queries")
    widths = {ours: settings.integer(theirs, silent.widths[ours], least=1) for ours, theirs in WIDTHS.items()}
    settings.must_be("mlp_bias", False, "dense layers have no biases")
    turned, temperature = widths["rope_dim"], 0.0
    head_dim = turned + widths["plain_dim"] if silent.temperature else turned
    settings.must_be("head_dim", head_dim, "it follows from qk_rope_head_dim and qk_nope_head_dim")
    if silent.temperature:
        settings, temperature = _growing(settings, turned / head_dim)
    rope = _rope(silent, settings, around["max_positions"])
    attention = LatentAttentionConfig(
        model_dim=around["model_dim"], num_heads=heads, **widths, rope=rope, temperature=temperature,
        query_rank=settings.integer("q_lora_rank", silent.query_rank, null=None, least=1),
        bias=settings.flag("attention_bias", False), dropout=settings.number("attention_dropout", 0.0),
    )
    dense = silent.dense.read(settings)
    beside = DenseConfig.beside(moe, dense["dense_dim"]) if dense["dense_layers"] else moe
    ffns = (beside if i in dense["dense_layers"] else moe for i in range(layers))
    return DecoderConfig(layers=tuple(LayerConfig(attention=attention, ffn=ffn) for ffn in ffns), **around)


def _rope(silent: Silent, settings: Settings, max_positions: int) -> RopeConfig:
    """The rotation of a head's `rope_dim` entries."""
    rope = read_rope(settings, 1e4, max_positions)
    name, said = rope_object(settings)
    if rope.kind not in ("default", "yarn"):
        inner = Settings(said, settings.errors, f"{name}.")
        inner.must_be("mscale_all_dim", 0.0, "scores are scaled by it where rope_type is yarn")
    neighbours = settings.flag("rope_interleave", True) if silent.interleave else True
    return replace(rope, pairs="neighbours" if neighbours else "halves", dtype=silent.turned_in)


def _growing(settings: Settings, share: float) -> tuple[Settings, float]:
    """Mistral 4's settings without what they say of its queries in the object of the rotation, and how fast these grow
    with their position. `share` is what turns of a head, which the object repeats.
    """
    name, said = rope_object(settings)
    said = said or MISTRAL4_ROPE
    inner = Settings(said, settings.errors, f"{name}.")
    inner.must_be("partial_rotary_factor", share, "the share of qk_rope_head_dim")
    if "llama_4_scaling_beta" not in said:
        settings.errors.append(f"{name}.llama_4_scaling_beta is missing")
    rest = {key: value for key, value in said.items() if key != "partial_rotary_factor"}
    growth = inner.number("llama_4_scaling_beta", 0.0)
    return Settings({**settings.values, name: rest}, settings.errors), growth


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


def latent(architecture: str, silent: Silent) -> Whole:
    """A decoder of latent attention in every layer."""
    return Whole(
        architecture, partial(read, silent), partial(write, silent), attention={"latent": LATENT}, order=EXPERTS_FIRST,
        carried=(LAYER,),
    )


def widths(rank: int, rope_dim: int, plain_dim: int, value_dim: int) -> dict[str, int]:
    """Sizes by our fields."""
    return {"rank": rank, "rope_dim": rope_dim, "plain_dim": plain_dim, "value_dim": value_dim}


MISTRAL4_ROPE = {
    "type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "original_max_position_embeddings": 8192,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}
DEEPSEEK_V2 = latent(
    "DeepseekV2ForCausalLM",
    Silent(widths(512, 64, 128, 128), 1536, first_dense(0), 2048, interleave=False, turned_in="float32"),
)
DEEPSEEK_V3 = latent("DeepseekV3ForCausalLM", Silent(widths(512, 64, 128, 128), 1536, first_dense(3), 4096))
GLM4_LITE = latent(
    "Glm4MoeLiteForCausalLM",
    Silent(widths(512, 64, 192, 256), 768, layer_kinds(first_alone), 202752, norm_eps=1e-5),
)
MISTRAL4 = latent(
    "Mistral4ForCausalLM", Silent(widths(256, 64, 64, 128), 1024, first_dense(0), 1048576, temperature=True)
)
