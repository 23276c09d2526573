"""What `jax-moe inspect` says of published config.json files, their values written by hand: the published totals."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from jax_moe.parameters import declared
from jax_moe.porting.families import family_named
from jax_moe.porting.state_dict import abstract_decoder
from moe_cli.sizes import count_parameters
from parity_tests.cli.commands import fails, run

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


def published(billions: float, counted: int) -> bool:
    """Whether a number of parameters is written so."""
    tenth = 10 ** len(str(billions).partition(".")[2])
    exact = counted / 1e9 * tenth
    return round(billions * tenth) in (round(exact), math.floor(exact))


def test_exact_totals() -> None:
    """Two that their publishers' files hold, to the last parameter; a wrong number is told apart."""
    assert published(46.7, 46_702_792_704) and not published(46.7, 46_802_792_704)
    for name, total in (("Mixtral-8x7B", 46_702_792_704), ("Kimi-K2", 1_026_408_232_448)):
        values = PUBLISHED[name][0]
        config = family_named(values["model_type"]).config(values)
        assert count_parameters(declared(abstract_decoder(config)), config).total == total


def test_experts_that_return_their_input_have_no_parameters() -> None:
    """Two more choices for the router, of 4096 numbers each in 32 layers; as many experts with weights as before."""
    values = PUBLISHED["Mixtral-8x7B"][0]
    config = family_named(values["model_type"]).config(values)
    with_two = dataclasses.replace(config.moe, num_experts=10, identity_experts=2)
    layers = tuple(dataclasses.replace(layer, ffn=with_two) for layer in config.layers)
    before, after = (
        count_parameters(declared(abstract_decoder(one)), one)
        for one in (config, dataclasses.replace(config, layers=layers))
    )
    assert after.experts == before.experts
    assert after.total - before.total == after.active - before.active == 32 * 2 * 4096


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both totals to the digits that were published, rounded or cut off; some leave the embedding out of the active."""
    values, total, active = PUBLISHED[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    told = run(capsys, "inspect", file)
    found = re.search(r"([\d,]+) parameters, ([\d,]+) of them active", told)
    assert found is not None, told
    counted, used = (int(said.replace(",", "")) for said in found.groups())
    assert published(total, counted), told
    assert published(active, used) or published(active, used - values["vocab_size"] * values["hidden_size"]), told
    assert "files: none, this is the config.json alone" in told


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "bert"}, "config.json: model_type='bert': must be one of "),
    ({"kv_lora_rank": "many"}, "config.json: kv_lora_rank='many': must be an integer"),
    ({"torch_dtype": "int3"}, "config.json: dtype='int3': must be one of float64"),
    ({"quantization_config": {"quant_method": "magic"}}, "quantization_config.quant_method='magic': must be one of"),
])
def test_what_is_wrong_is_said_in_a_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3 | changes))
    assert message in fails(capsys, "inspect", tmp_path / "config.json")
