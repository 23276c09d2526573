"""Published models: their config.json, its values written by hand, and the totals that their publishers state."""

from typing import Any

V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "norm_topk_prob": True,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 163840, "rope_theta": 10000, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]},
}
QWEN3 = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}
OSS = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880, "num_local_experts": 32,
    "num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150000, "swiglu_limit": 7.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
}
# config.json, billions of parameters in all and active for a token, as published
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "Mixtral-8x7B": ({
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rope_theta": 1e6,
    }, 46.7, 12.9),
    "Qwen3-30B-A3B": (QWEN3, 30.5, 3.3),
    "Qwen3-235B-A22B": ({
        **QWEN3, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    }, 235, 22),
    "DeepSeek-V3": (V3, 671, 37),
    "GLM-4.5": ({
        "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 5120, "num_hidden_layers": 92, "head_dim": 128,
        "num_attention_heads": 96, "num_key_value_heads": 8, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "n_routed_experts": 160, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "use_qk_norm": True, "attention_bias": True,
        "partial_rotary_factor": 0.5, "rope_theta": 1e6, "num_nextn_predict_layers": 1,
    }, 353, 32),  # published as 355 with the layer that predicts further tokens
    "Kimi-K2": ({
        **V3, "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0,
    }, 1026, 32),
    "gpt-oss-20b": (OSS, 20.9, 3.6),
    "gpt-oss-120b": ({**OSS, "num_hidden_layers": 36, "num_local_experts": 128}, 116.8, 5.1),
    "OLMoE-1B-7B": ({
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64,
        "num_experts_per_tok": 8,
    }, 6.9, 1.3),
    "Granite-3.0-1b-a400m": ({
        "model_type": "granitemoe", "vocab_size": 49155, "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 512, "num_local_experts": 32,
        "num_experts_per_tok": 8, "tie_word_embeddings": True, "embedding_multiplier": 12, "logits_scaling": 6,
        "attention_multiplier": 0.015625, "residual_multiplier": 0.22,
    }, 1.33, 0.43),
}
