"""Contracts of families whose decoders are tables, written as config.json and read again. Needs no torch."""

from typing import Any

import pytest

from jax_moe import DecoderConfig, presets
from jax_moe.config.as_json import config_from_json, config_to_json
from jax_moe.config.attention import RopeConfig
from jax_moe.config.moe import MoEConfig, RouterConfig
from jax_moe.porting.families import FAMILIES, family_named
from parity_tests.porting.hf_mutations import base_of

SIZES: dict[str, Any] = {
    "vocab_size": 11, "model_dim": 8, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
    "balance_loss_weight": 0.0,
}


def mixture(name: str, **settings: Any) -> MoEConfig:
    """The contract that a config.json of the family has."""
    return FAMILIES[name].mixture_config({"model_type": name, "hidden_size": 8, **settings})


FIRST = {"dense_layers": (0, 1), "dense_dim": 5}
V3 = presets.glm4_moe(8, 6, 4, 2)
HALF = RopeConfig(fraction=0.5)
WIDE = {"rope": RopeConfig(dtype="float32")}
PER_HEAD, FULL = {"qk_norm": "per_head"}, {"qk_norm": "full_width"}
BIASES, SLIDING = {"qkv_bias": True, "output_bias": True}, {"sliding_window": 3, "sliding_layers": (0, 2)}
MINIMAX = mixture("minimax_m2", num_local_experts=4, intermediate_size=6, num_experts_per_tok=2)
HUNYUAN = mixture("hunyuan_v1_moe", num_experts=4, intermediate_size=6, moe_topk=2)
OSS = mixture("gpt_oss", num_local_experts=4, intermediate_size=6, num_experts_per_tok=2)
PHI = mixture("phimoe", num_local_experts=4, intermediate_size=6, num_experts_per_tok=2, input_jitter_noise=0.1)
LONG = RopeConfig(
    kind="longrope", original_max_positions=32, short_factors=(1.0, 2.0), long_factors=(1.5, 4.0), short_mscale=1.1,
)
SINKS = {"sinks": True, "norm": "rms_wide"}
# Contracts that each family can say, and one that it cannot with the field that it has no words for.
SAID: dict[str, tuple[dict[str, Any], ...]] = {
    "glm4_moe": ({"moe": V3, "rope": HALF}, {"moe": V3, "qk_norm": "per_head", "qkv_bias": True, **FIRST}),
    "dots1": ({"moe": V3, **PER_HEAD, **BIASES, **FIRST}, {"moe": V3, **PER_HEAD, **SLIDING}),
    "solar_open": ({"moe": V3, "qkv_bias": True}, {"moe": V3}),
    "minimax_m2": ({"moe": MINIMAX, **FULL, "rope": HALF}, {"moe": MINIMAX, **FULL, "balance_loss_weight": 0.02}),
    "flex_olmo": ({"moe": presets.olmoe(8, 6, 4, 2), **FULL, **BIASES, **WIDE, "norm_place": "after"},),
    "granitemoeshared": ({"moe": presets.granite_moe(8, 6, 4, 2), "attention_multiplier": 0.3, "logits_divisor": 2.0},),
    "hunyuan_v1_moe": ({"moe": HUNYUAN, **PER_HEAD, **BIASES, "qk_norm_place": "after_rope"},),
    "phimoe": (
        {"moe": PHI, "norm": "layer", **BIASES, "head_bias": True, "rope": LONG},
        {"moe": PHI, "norm": "layer", "tied_embeddings": True, "sliding_window": 3,
         "sliding_layers": (0, 1, 2, 3)},
    ),
    "gpt_oss": ({"moe": OSS, **SINKS, **BIASES}, {"moe": OSS, **SINKS, "num_kv_heads": 4, "norm_eps": 1e-3, **SLIDING}),
}
UNSAID: dict[str, tuple[dict[str, Any], str]] = {
    "glm4_moe": ({"moe": V3, "dense_layers": (1,), "dense_dim": 5}, "dense_layers"),
    "dots1": ({"moe": V3}, "qk_norm"),
    "solar_open": ({"moe": V3, "output_bias": True}, "output_bias"),
    "minimax_m2": ({"moe": MINIMAX, **FULL, "qk_norm_place": "after_rope"}, "qk_norm_place"),
    "flex_olmo": ({"moe": presets.olmoe(8, 6, 4, 2), **FULL, **WIDE}, "norm_place"),
    "gpt_oss": ({"moe": OSS, "norm": "rms_wide"}, "sinks"),
    "phimoe": ({"moe": PHI}, "norm"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_family_can_say(name: str) -> None:
    for own in SAID[name]:
        config = DecoderConfig.grouped(**SIZES | own)
        values = FAMILIES[name].values(config)
        assert FAMILIES[name].config(values) == config
        assert config_from_json(DecoderConfig, config_to_json(config), "config") == config


EXAONE = {
    "model_type": "exaone_moe", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 6, "num_experts_per_tok": 2,
    "intermediate_size": 5, "sliding_window": 3,
}


def test_layers_that_see_all_turn_nothing() -> None:
    """EXAONE's fourth layer, and none that a list of types names so; read again from what is written."""
    family = FAMILIES["exaone_moe"]
    for more, whole, dense in (
        ({}, (3,), (0,)),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2, "mlp_layer_types": ["sparse", "dense"] * 2},
         (0, 2), (1, 3)),
    ):
        config = family.config(EXAONE | more)
        bare = tuple(i for i, layer in enumerate(config.layers) if layer.attention.rope is None)  # type: ignore[attr-defined]
        assert bare == whole and config.dense_layers == dense and config.shorthand is None
        assert family.config(family.values(config)) == config
        assert config_from_json(DecoderConfig, config_to_json(config), "config") == config


ERNIE = {
    "model_type": "ernie4_5_moe", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "moe_num_experts": 4, "moe_intermediate_size": 6, "moe_k": 2, "intermediate_size": 5,
}


@pytest.mark.parametrize(("more", "sparse"), [
    ({}, (1, 2, 3, 4, 5)), ({"moe_layer_start_index": 0, "moe_layer_end_index": 3}, (0, 1, 2, 3)),
    ({"moe_layer_interval": 2}, (1, 3, 5)), ({"moe_layer_start_index": 4, "moe_layer_interval": 3}, (5,)),
])
def test_the_range_of_mixtures(more: dict[str, int], sparse: tuple[int, ...]) -> None:
    """Ernie's, by hand; neighbours are turned together and the head is tied where nothing else is said."""
    family = FAMILIES["ernie4_5_moe"]
    config = family.config(ERNIE | more)
    assert config.moe_layers == sparse and config.tied_embeddings
    assert config.rope is not None and config.rope.pairs == "neighbours"
    assert family.config(family.values(config)) == config


def test_alpha_stretches_the_base() -> None:
    """HunYuan's as published, and a list of one number of choices for each layer."""
    values = {
        "model_type": "hunyuan_v1_moe", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "head_dim": 4,
        "num_attention_heads": 4, "num_experts": 4, "intermediate_size": 6, "moe_topk": [2, 2],
        "rope_scaling": {"type": "dynamic", "alpha": 9.0, "factor": 1.0}, "rope_theta": 100.0,
    }
    config = FAMILIES["hunyuan_v1_moe"].config(values)
    assert config.rope == RopeConfig(theta=100.0 * 9.0 ** (4 / 2)) and config.moe.top_k == 2
    with pytest.raises(ValueError, match=r"moe_topk=\[1, 2\]: must be an integer"):
        FAMILIES["hunyuan_v1_moe"].config(values | {"moe_topk": [1, 2]})


@pytest.mark.parametrize("name", UNSAID)
def test_what_a_family_cannot_say(name: str) -> None:
    own, field = UNSAID[name]
    with pytest.raises(ValueError, match=rf"^{name}: must be a contract of that family; it cannot say {field}$"):
        FAMILIES[name].values(DecoderConfig.grouped(**SIZES | own))


@pytest.mark.parametrize(("changes", "message"), [
    ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1: must be an integer of at least 0"),
    ({"rope_parameters": {"partial_rotary_factor": 2.0}},
     "rope_parameters: fraction=2.0: must be a number above 0 and at most 1"),
    ({"use_qk_norm": "yes"}, "use_qk_norm='yes': must be true or false"),
])
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str) -> None:
    values = FAMILIES["glm4_moe"].values(DecoderConfig.grouped(**SIZES | SAID["glm4_moe"][0]))
    with pytest.raises(ValueError) as caught:
        FAMILIES["glm4_moe"].config(values | changes)
    assert str(caught.value) == message


LLAMA4 = {
    "model_type": "llama4_text", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 4, "intermediate_size": 6, "intermediate_size_mlp": 5,
    "num_experts_per_tok": 2,
}


def test_llama4_by_layers() -> None:
    """What a silent config.json means, and lists that say otherwise; a model around the text model says the same."""
    family = FAMILIES["llama4"]
    for more, turns, chunks, sparse in (
        ({}, [1, 1, 1, 0], [8192, 8192, 8192, None], (0, 1, 2, 3)),
        ({"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": 3},
         [1, 0, 1, 0], [3, None, 3, None], (1, 3)),
        ({"moe_layers": [0, 9], "no_rope_layers": [0, 1, 1, 0], "use_qk_norm": False, "attention_chunk_size": None},
         [0, 1, 1, 0], [None] * 4, (0,)),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2, "attn_temperature_tuning": False},
         [1, 1, 1, 0], [None, 8192, None, 8192], (0, 1, 2, 3)),
    ):
        config = family.config(LLAMA4 | more)
        attentions: list[Any] = [layer.attention for layer in config.layers]
        assert [int(one.rope is not None) for one in attentions] == turns and config.moe_layers == sparse
        assert [one.chunk for one in attentions] == chunks
        normed = more.get("use_qk_norm", True)
        assert [one.qk_norm == "per_head" for one in attentions] == [bool(normed and one) for one in turns]
        grows = more.get("attn_temperature_tuning", True)
        assert [one.temperature for one in attentions] == [0.1 if grows and not one else 0.0 for one in turns]
        assert family.config(family.values(config)) == config
        assert family.config({"model_type": "llama4", "text_config": LLAMA4 | more}) == config
        assert config_from_json(DecoderConfig, config_to_json(config), "config") == config
        assert len(config.stacks) == (2 if len(sparse) == 4 else 3), "one stack of attention"


@pytest.mark.parametrize(("changes", "message"), [
    ({"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]: must be null or 4 of 1 (turns) and 0"),
    ({"layer_types": ["sliding_attention"] * 4},
     f"layer_types={['sliding_attention'] * 4}: must be 4 of chunked_attention, full_attention"),
    ({"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 4},
     f"layer_types={['chunked_attention'] * 4}: must be 4 of full_attention"),
    ({"attention_chunk_size": 0}, "attention_chunk_size=0: must be an integer of at least 1"),
    ({"moe_layers": []}, "dense_layers=(0, 1, 2, 3): must be fewer than all layers"),
])
def test_llama4_refuses_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        FAMILIES["llama4"].config(LLAMA4 | changes)
    assert str(caught.value) == message


GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text", "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
    "num_experts": 4, "intermediate_size": 5, "moe_intermediate_size": 6, "top_k_experts": 2, "global_head_dim": 8,
}
KEYS = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


def test_gemma4_by_layers() -> None:
    """Published names and those that transformers writes: layers that see all have heads and rotation of their own."""
    family, whole = FAMILIES["gemma4"], RopeConfig(kind="proportional", theta=1e6, fraction=0.25, max_positions=131072)
    single = {"per_layer_config": {"2": {"head_dim": 8, "num_key_value_heads": 1}}, "attention_k_eq_v": True}
    for more, heads, keys in (
        ({}, [(4, 2), (4, 2), (8, 2)], [False] * 3),
        (KEYS, [(4, 2), (4, 2), (8, 1)], [False, False, True]),
        ({"num_global_key_value_heads": 1}, [(4, 2), (4, 2), (8, 2)], [False] * 3),
        (single, [(4, 2), (4, 2), (8, 1)], [False, False, True]),
        (KEYS | {"per_layer_config": None}, [(4, 2)] * 3, [False, False, True]),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"], "final_logit_softcapping": 30.0},
         [(8, 2), (4, 2), (8, 2)], [False] * 3),
    ):
        config = family.config(GEMMA4 | more)
        found: list[Any] = [layer.attention for layer in config.layers]
        assert [(one.head_dim, one.num_kv_heads) for one in found] == heads
        assert [one.value_from_key for one in found] == keys and config.embedding_multiplier == 4
        assert all((one.rope == whole) == (one.window is None) for one in found) and config.tied_embeddings
        assert config.logits_softcap == more.get("final_logit_softcapping")
        assert family.config(family.values(config)) == config
        assert family.config({"model_type": "gemma4", "text_config": GEMMA4 | more}) == config
        assert config_from_json(DecoderConfig, config_to_json(config), "config") == config


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_size_per_layer_input": 4},
     "hidden_size_per_layer_input=4: must be 0 (embeddings of each layer)"),
    ({"num_kv_shared_layers": 1}, "num_kv_shared_layers=1: must be 0 or absent (nothing else is supported)"),
    ({"enable_moe_block": False}, "enable_moe_block must be true: without it no layer has a mixture"),
    ({"use_bidirectional_attention": "all"},
     "use_bidirectional_attention='all': must be null or 'vision' (a decoder sees what stands before)"),
    ({"layer_types": ["sliding_attention"] * 3},
     f"layer_types={['sliding_attention'] * 3}: must be 3 of sliding_attention, full_attention, the last full_"),
    ({"per_layer_config": {"1": {"num_experts": 3}}},
     "per_layer_config={'1': {'num_experts': 3}}: must be an object of layer numbers, each with head_dim and "
     "num_key_value_heads at most"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
     "rope_parameters.rope_type='yarn': must be one of default, proportional"),
])
def test_gemma4_refuses_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        FAMILIES["gemma4"].config(GEMMA4 | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["qwen2_moe", "exaone_moe", "llama4", "gemma4", "qwen3_next", "dots1"])
def test_a_very_long_value_is_cut(family: str) -> None:
    """What a damaged file says is shown in part."""
    said = []
    for name in ("layer_types", "mlp_layer_types", "hidden_size", "rope_parameters", "hidden_act"):
        try:
            FAMILIES[family].config({"model_type": family, **base_of(family), name: ["x" * 50_000, "full_attention"]})
        except ValueError as error:
            said.append(str(error))
    assert len(said) >= 3 and all(len(words) < 4000 and "x" * 1000 not in words for words in said)


def test_a_very_long_model_type_is_cut() -> None:
    with pytest.raises(ValueError, match="model_type='xxx") as caught:
        family_named("x" * 50_000)
    assert len(str(caught.value)) < 4000


def test_a_very_long_argument_is_cut() -> None:
    """Of a contract; a value of usual length is shown whole."""
    with pytest.raises(ValueError, match="score='xxx") as caught:
        RouterConfig(score="x" * 50_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match=f"'{'x' * 300}'"):
        RouterConfig(score="x" * 300)  # type: ignore[arg-type]
