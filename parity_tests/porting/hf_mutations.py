"""Mutations of a config.json, to see whether both sides read the same contract: every field, many values."""

import math
from collections.abc import Iterator
from typing import Any

from parity_tests.table.family_cases import (
    CLUSTERS,
    COMMON,
    ERNIE,
    EXAONE,
    GEMMA4,
    GRANITE,
    HUNYUAN,
    LATENT,
    LLAMA4,
    LONGROPE,
    MIXTRAL,
    MULTIPLIERS,
    NEXT,
    OLMOE,
    QWEN2,
    QWEN3,
    V3,
    sizes,
)

ABSENT: Any = object()  # the key is removed
LAYERS, THETA = 2, 50.0
ROPE = {"rope_type": "default", "rope_theta": THETA}
OUTER: dict[str, Any] = {
    **COMMON, "output_router_logits": True, "router_aux_loss_coef": 0.1, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    "dtype": "float32", "architectures": ["X"], "transformers_version": "5.24.0", "rope_parameters": ROPE,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 6}
BASES: dict[str, dict[str, Any]] = {
    "mixtral": {
        **OUTER, **sizes(24, 4, 2, LAYERS, **MIXTRAL), **HEADS, "sliding_window": None, "router_jitter_noise": 0.0
    },
    "qwen2_moe": {
        **OUTER, **sizes(24, 4, 2, LAYERS, **QWEN2), "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": False, "qkv_bias": True, "use_sliding_window": False, "sliding_window": 4,
        "max_window_layers": 2, "layer_types": None,
    },
    "qwen3_moe": {
        **OUTER, **sizes(24, 4, 2, LAYERS, **QWEN3), **HEADS, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True, "attention_bias": False, "use_sliding_window": False, "sliding_window": 4,
        "max_window_layers": 2,
    },
    "olmoe": {
        **OUTER, **sizes(24, 4, 4, LAYERS, **OLMOE), "attention_bias": False, "clip_qkv": None, "norm_topk_prob": False,
    },
    "granitemoe": {**OUTER, **sizes(24, 4, 4, LAYERS, **GRANITE), **MULTIPLIERS, "attention_bias": False},
}
# Families whose decoders are tables: only the settings that no family above has are changed.
SEES = ["sliding_attention", "full_attention"]
TABLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "glm4_moe": (
        {**sizes(24, 4, 2, LAYERS, **V3), **CLUSTERS, "head_dim": 8, "use_qk_norm": True, "attention_bias": False},
        ("attention_bias", "use_qk_norm", "first_k_dense_replace", "partial_rotary_factor", "router_aux_loss_coef"),
    ),
    "dots1": (
        {**sizes(24, 4, 2, LAYERS, **V3), **CLUSTERS},
        ("first_k_dense_replace", "layer_types", "sliding_window", "max_window_layers", "attention_bias"),
    ),
    "solar_open": ({**sizes(24, 4, 2, LAYERS, **V3), **CLUSTERS, "head_dim": 6}, ("attention_bias",)),
    "minimax_m2": (
        {**sizes(24, 4, 2, LAYERS, **MIXTRAL), "head_dim": 8}, ("rotary_dim", "partial_rotary_factor", "sliding_window")
    ),
    "flex_olmo": ({**sizes(24, 4, 2, LAYERS, **OLMOE)}, ("attention_bias", "num_key_value_heads")),
    "exaone_moe": (
        {**sizes(24, 4, 2, LAYERS, **EXAONE), **CLUSTERS, "sliding_window": 3},
        ("sliding_window", "sliding_window_pattern", "layer_types", "mlp_layer_types", "first_k_dense_replace"),
    ),
    "ernie4_5_moe": (
        {**sizes(24, 4, 2, LAYERS, **ERNIE), "tie_word_embeddings": False},
        ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "tie_word_embeddings", "use_bias",
         "attention_dropout"),
    ),
    "hunyuan_v1_moe": ({**sizes(24, 4, 2, LAYERS, **HUNYUAN), "head_dim": 6}, ("attention_bias", "moe_topk")),
    "deepseek_v2": (
        {**sizes(24, 4, 4, LAYERS, **V3), **LATENT, **CLUSTERS, "q_lora_rank": None},
        ("topk_method", "q_lora_rank", "num_key_value_heads", "first_k_dense_replace", "mlp_bias", "head_dim",
         "moe_layer_freq"),
    ),
    "deepseek_v3": (
        {**sizes(24, 4, 4, LAYERS, **V3), **LATENT, **CLUSTERS, "q_lora_rank": 7, "first_k_dense_replace": 1},
        ("rope_interleave", "attention_bias", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
         "head_dim", "num_key_value_heads"),
    ),
    "glm4_moe_lite": (
        {**sizes(24, 4, 4, LAYERS, **V3), **LATENT, "q_lora_rank": 7},
        ("mlp_layer_types", "first_k_dense_replace", "rope_interleave", "head_dim"),
    ),
    "mistral4": (
        {**sizes(24, 4, 4, LAYERS, **V3), **LATENT, "q_lora_rank": 7,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "mscale_all_dim": 1.0,
                             "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.3}},
        ("rope_interleave", "rope_parameters", "first_k_dense_replace"),
    ),
    "gpt_oss": (
        {**sizes(24, 4, 2, LAYERS, **MIXTRAL), "head_dim": 6, "sliding_window": 3},
        ("sliding_window", "layer_types", "attention_bias", "rope_parameters", "rope_scaling", "num_key_value_heads",
         "head_dim", "swiglu_limit", "rms_norm_eps", "max_position_embeddings"),
    ),
    "llama4": (
        {**sizes(24, 4, 2, LAYERS, **LLAMA4), "head_dim": 6, "model_type": "llama4_text", "no_rope_layers": [1, 0],
         "attention_chunk_size": 4, "floor_scale": 3, "attn_scale": 0.3, "moe_layers": [1]},
        ("attention_chunk_size", "no_rope_layers", "no_rope_layer_interval", "attn_temperature_tuning", "floor_scale",
         "attn_scale", "use_qk_norm", "moe_layers", "interleave_moe_layer_step", "intermediate_size_mlp", "layer_types",
         "attention_bias", "num_key_value_heads", "rms_norm_eps"),
    ),
    "gemma4": (
        {**{name: value for name, value in OUTER.items() if name != "rope_parameters"},
         **sizes(24, 4, 2, LAYERS, **GEMMA4), "head_dim": 6, "model_type": "gemma4_text", "global_head_dim": 8,
         "layer_types": SEES, "sliding_window": 3, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
         "final_logit_softcapping": 5.0, "rope_parameters": None, "hidden_activation": "gelu_pytorch_tanh"},
        ("layer_types", "sliding_window", "attention_k_eq_v", "num_global_key_value_heads", "global_head_dim",
         "final_logit_softcapping", "rope_parameters", "enable_moe_block", "hidden_size_per_layer_input",
         "num_kv_shared_layers", "use_bidirectional_attention", "attention_bias", "per_layer_config",
         "hidden_activation", "rms_norm_eps", "use_double_wide_mlp", "tie_word_embeddings", "head_dim"),
    ),
}
OF_NETS = (
    "layer_types", "full_attention_interval", "linear_num_key_heads", "linear_conv_kernel_dim", "attention_bias",
    "partial_rotary_factor", "rms_norm_eps",
)
TABLES["qwen3_next"] = (
    {**sizes(24, 4, 2, LAYERS, **NEXT), "head_dim": 8, "intermediate_size": 18, "norm_topk_prob": True,
     "full_attention_interval": 2, "partial_rotary_factor": 0.5, "rope_parameters": None},
    (*OF_NETS, "mlp_only_layers", "decoder_sparse_step"),
)
TABLES["qwen3_5_moe"] = (
    {**sizes(24, 4, 2, LAYERS, **NEXT), "head_dim": 8, "model_type": "qwen3_5_moe_text",
     "layer_types": ["linear_attention", "full_attention"],
     "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    ("layer_types", "full_attention_interval", "attention_bias", "rope_parameters", "num_key_value_heads"),
)
# Of equal long and short factors, of which transformers 5.24 only takes the short ones
TABLES["phimoe"] = (
    {**sizes(24, 4, 2, LAYERS, **MIXTRAL), "router_jitter_noise": 0.2, "input_jitter_noise": 0.0, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 50.0, **LONGROPE, "long_factor": LONGROPE["short_factor"],
        "original_max_position_embeddings": 16}},
    ("attention_bias", "lm_head_bias", "sliding_window", "router_jitter_noise", "input_jitter_noise", "rope_scaling",
     "num_experts_per_tok", "original_max_position_embeddings", "rope_parameters", "num_key_value_heads"),
)
FEW: tuple[Any, ...] = (
    0, 1, 2, 0.5, "2", True, [], [2, 2], [2, 3], [0, 1], [1, 1], SEES, SEES[::-1], ["dense", "sparse"],
    ["chunked_attention", "full_attention"], ["linear_attention", "full_attention"],
    ["full_attention", "linear_attention"], ["linear_attention", "linear_attention"],
)
# Values tried for every field.
ANY: tuple[Any, ...] = (
    ABSENT, None, 0, -1, 1, 2.5, "2", True, False, [], [0], {}, math.nan, math.inf, -math.inf, 10**31,
)
# Meaningful values, by field.
MORE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "relu", "swish", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "mish"),
    "num_attention_heads": (8,), "num_key_value_heads": (4,), "head_dim": (12,), "num_experts_per_tok": (3, 99),
    "rms_norm_eps": (0.1,), "router_aux_loss_coef": (0.5,), "sliding_window": (3,), "clip_qkv": (0.5,),
    "pad_token_id": (99,), "mlp_only_layers": ([1], [7], [-1], [True], ["0"]), "decoder_sparse_step": (-2,),
    "max_position_embeddings": (6,),
    "layer_types": (["full_attention"] * 2, ["sliding_attention", "full_attention"], ["full_attention"], ["x", "y"]),
    "embedding_multiplier": (1.5,), "attention_multiplier": (0.5,), "residual_multiplier": (1.5,),
    "logits_scaling": (4.0,),
}
# Fields that the base does not have.
ADDED: dict[str, tuple[Any, ...]] = {
    "num_experts": (3, 5, 6, 7), "num_local_experts": (3, 5, 6, 7), "rope_theta": (None, 20.0, math.inf),
    "head_dim": (None, 0, 6, 12),
    "is_causal": (False, True), "partial_rotary_factor": (0.5, 1.0), "per_layer_config": ([{}, {}],),
    "torch_dtype": ("float32",), "original_max_position_embeddings": (None, 7, 0), "sliding_window": (3,),
    "attention_bias": (True,), "qkv_bias": (False,), "clip_qkv": (0.5,), "norm_topk_prob": (True,),
    "embedding_multiplier": (3.0,),
    "eos_token_id": (99,),
    "quantization_config": ({"bits": 4},),
    "layer_types": (["full_attention"] * 2,), "intermediate_size": (18,), "shared_expert_intermediate_size": (10,),
}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR, DYNAMIC = {**ROPE, "rope_type": "linear", "factor": 4.0}, {**ROPE, "rope_type": "dynamic", "factor": 4.0}
EXTRA = ("attention_factor", "beta_fast", "beta_slow", "mscale", "truncate", "partial_rotary_factor", "alpha")
ROTARY_VALUES: tuple[Any, ...] = (ABSENT, None, 0, 0.5, 2, 3.5, -1.0, "2", True, [], math.nan, math.inf, 10**31)
# Changes of several fields at once.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 20.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 20.0},
    {"rope_scaling": {}, "rope_theta": 20.0}, {"rope_scaling": None}, {"rope_scaling": []}, {"rope_scaling": "x"},
    {"rope_scaling": YARN, "rope_parameters": LINEAR},
    {"rope_scaling": LINEAR, "rope_parameters": YARN, "rope_theta": 20.0},
    {"rope_parameters": {"type": "linear", "factor": 4.0}, "rope_theta": 20.0},
    {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "linear", "type": "x", "factor": 4.0}},
    {"rope_parameters": {"rope_type": None, "type": "linear", "factor": 4.0}},
    {"rope_parameters": {"full_attention": ROPE}}, {"rope_parameters": {**ROPE, "full_attention": LINEAR}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": None},
    {"rope_parameters": ABSENT}, {"rope_parameters": ABSENT, "rope_theta": 20.0},
    {"rope_parameters": YARN, "original_max_position_embeddings": 9},
    {"rope_parameters": YARN, "original_max_position_embeddings": None},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 9},
    {"rope_parameters": {**YARN, "factor": None}},
    {"rope_parameters": {**YARN, "factor": None}, "max_position_embeddings": 8},
    {"rope_parameters": {**YARN, "beta_fast": 1.0, "beta_slow": 8.0}},
    {"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 2.0}},
    {"rope_parameters": {**YARN, "mscale": 0.5}}, {"rope_parameters": {**YARN, "mscale": 0.0, "mscale_all_dim": 2.0}},
    {"rope_parameters": {**LLAMA3, "low_freq_factor": 9.0}}, {"rope_parameters": DYNAMIC, "max_position_embeddings": 6},
    {"rope_parameters": DYNAMIC, "max_position_embeddings": ABSENT},
    {"use_sliding_window": True}, {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 0},
    {"use_sliding_window": True, "sliding_window": ABSENT}, {"use_sliding_window": True, "max_window_layers": 0},
    {"use_sliding_window": True, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention"] * 2},
    {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
    {"use_sliding_window": False, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
    {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12},
    {"num_attention_heads": 2, "num_key_value_heads": None}, {"num_attention_heads": 8, "num_key_value_heads": None},
    {"num_attention_heads": 2, "num_key_value_heads": ABSENT, "head_dim": ABSENT},
)


def mutations(family: str) -> Iterator[dict[str, Any]]:
    """Changes to the family's base; ABSENT removes a key."""
    if family in TABLES:
        own = TABLES[family][1]
        yield from ({name: value} for name in own for value in (ABSENT, None, *FEW))
        return
    base = BASES[family]
    fields = [
        name for name in base if name not in ("architectures", "transformers_version", "dtype", "rope_parameters")
    ]
    for name in fields:
        yield from ({name: value} for value in (*ANY, *MORE.get(name, ())))
    yield from ({name: value} for name, values in ADDED.items() if name not in base for value in values)
    for kind in (ROPE, LINEAR, DYNAMIC, YARN, LLAMA3):
        yield {"rope_parameters": kind}
        if family == "mixtral":  # a single reader serves all families, so one family tries its values
            extra = EXTRA if kind is YARN else ("partial_rotary_factor", "attention_factor")
            for name in (*kind, *extra):
                yield from ({"rope_parameters": without({**kind, name: value})} for value in ROTARY_VALUES)
    yield from TOGETHER


def base_of(family: str) -> dict[str, Any]:
    """The config.json that is changed."""
    return BASES[family] if family in BASES else OUTER | TABLES[family][0]


def without(values: dict[str, Any]) -> dict[str, Any]:
    """The values without ABSENT fields."""
    return {name: value for name, value in values.items() if value is not ABSENT}
