"""Tiny configurations of every model type whose mixture is known: a line each, in the words of its own config.json."""

from dataclasses import dataclass, field
from typing import Any

# Two odd shapes of tokens and sizes: B, T, and D, F, E, K.
SHAPES = (((3, 7), (10, 6, 6, 2)), ((1, 23), (14, 10, 8, 3)))

# As little as there can be around two layers.
TINY = {
    "vocab_size": 11, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A model type: its classes in transformers, what its configuration calls the sizes, the rest of a tiny model."""

    model_type: str
    prefix: str  # of its classes
    module: str = "SparseMoeBlock"  # the mixture's class, without the prefix
    sizes: str = "num_experts moe_intermediate_size num_experts_per_tok"  # experts, width, choices, in its words
    settings: dict[str, Any] = field(default_factory=dict)  # of both shapes
    others: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # of one shape each
    nested: str = ""  # where the text model's settings stand in the configuration
    top: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # settings beside the text model's, of one shape each
    model: str = "ForCausalLM"  # the class of a whole model; empty: none is made, for a `reason` in words
    reason: str = ""
    named: str = ""  # the type in config.json, if it is not that of the module
    alone: str = ""  # the type of the text model by itself, of which the whole model is then
    of_whole: bool = False  # whether the module takes the whole configuration, not the part with its sizes
    balance: bool = False  # whether transformers has a balance loss, and it counts the choices that are made
    seed: int = 10  # of weights that send a token to every expert
    spare: str = ""  # a tensor in memory of whose rows nothing reads those of experts that return their input
    unread: str = ""  # what begins the names in memory of another mixture
    twice: str = ""  # the setting that is a list: of text and of vision
    at: str = ""  # the mixture's own name in the layer, where something stands beside it
    beside: dict[str, str] = field(default_factory=dict)  # {name: class} of modules whose answers are added
    before: str = ""  # of a whole layer as the module: its child that reads the answer
    state: str = ""  # the setting that is the width of a state which its router reads and hands on

    def values(self, shape: int, alone: bool = False) -> dict[str, Any]:
        """The settings of a tiny whole model, or of its text model alone."""
        D, F, E, K = SHAPES[shape][1]
        experts, width, choices = self.sizes.split()
        sizes = {"hidden_size": D, experts: E, width: F, choices: K}
        values = {**TINY, **sizes, **self.settings, **self.others[shape]}
        values |= {self.twice: [values[self.twice], 4]} if self.twice else {}
        if alone:
            return values
        for word in reversed(self.nested.split(".") if self.nested else []):
            values = {word: values}
        return {**values, **self.top[shape]}


CLUSTERS = ({"n_group": 3, "topk_group": 2}, {"n_group": 4, "topk_group": 3})
NORM = ({"norm_topk_prob": True}, {"norm_topk_prob": False})
GREEDY = ({"topk_method": "greedy"}, {"topk_method": "group_limited_greedy", **CLUSTERS[1]})
BIAS = ({"use_expert_bias": True}, {"use_expert_bias": False})
V3 = "n_routed_experts moe_intermediate_size num_experts_per_tok"
LOCAL = "num_local_experts moe_intermediate_size num_experts_per_tok"
MIXTRAL = "num_local_experts intermediate_size num_experts_per_tok"
PLAIN = "num_experts intermediate_size num_experts_per_tok"
SCALED = {"routed_scaling_factor": 1.7}
SHARED = {"n_shared_experts": 2, **SCALED}
GATED = {"shared_expert_intermediate_size": 4}
FULL = ["full_attention", "full_attention"]
DENSE_FIRST = {"first_k_dense_replace": 1}
ONE_HEAD = {"num_attention_heads": 1}
VISION = {
    "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 10,
    "deepstack_visual_indexes": [0],
}
SEES = ({"vision_config": VISION}, {"vision_config": VISION})
ADAPTED = tuple(
    {"vision_config": {"adapter_out_dim": sizes[0]}, "audio_config": {"adapter_output_size": sizes[0]}}
    for _, sizes in SHAPES
)
HEARS = tuple({"audio_config": {"out_hidden_size": sizes[0]}} for _, sizes in SHAPES)
DBRX = {"n_heads": 2, "n_layers": 2, "max_seq_len": 16, "attn_config": {"kv_n_heads": 1, "rope_theta": 100.0}}
GEMMA_SIZES = "num_experts moe_intermediate_size top_k_experts"
GEMMA = {
    "intermediate_size": 5, "global_head_dim": 4, "hidden_size_per_layer_input": 0, "rms_norm_eps": 1e-2,
    "layer_types": ["sliding_attention", "full_attention"],
}
TOWER = {
    "model_type": "gemma4_vision", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 8, "position_embedding_size": 8,
}
AROUND = "a tiny vision model around the text model is not made"

SOFT_CAPS = {"mlp_gate_softcap": 0.9, "mlp_up_softcap": 1.1, "route_scale": 1.7, "unpadded_vocab_size": 11}
ERNIE_SEES = {"vision_config": {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}}
SMALL_INKLING = {
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 4, "d_rel": 4, "rel_extent": 4,
}


def v3(model_type: str, prefix: str, module: str = "MoE", **own: Any) -> Case:
    """DeepSeek-V3's sizes under its names, with clusters, two shared experts and scaled weights."""
    settings = {**SHARED, **own.pop("settings", {})}
    return Case(model_type, prefix, module, V3, settings, own.pop("others", CLUSTERS), **own)


def text(model_type: str, prefix: str, *where: Any, **own: Any) -> Case:
    """The text model of a multimodal model."""
    return Case(model_type, prefix, *where, nested="text_config", top=SEES, **own)


def granite(model_type: str, prefix: str, **settings: Any) -> Case:
    """Granite's mixture, its shared expert beside it in the layer."""
    return Case(
        model_type, prefix, "MoE", MIXTRAL, {"shared_intermediate_size": 4, **settings}, at="block_sparse_moe",
        beside={"shared_mlp": f"{prefix}MLP"}, balance=True,
    )


CASES = {one.model_type: one for one in (
    Case("mixtral", "Mixtral", sizes=MIXTRAL, balance=True),
    Case("switch_transformers", "SwitchTransformers", "SparseMLP", "num_experts d_ff num_experts_per_tok", {
        "expert_capacity": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2,
        "dropout_rate": 0.0}, model="ForConditionalGeneration", balance=True, seed=12),
    Case("nllb_moe", "NllbMoe", "SparseMLP", "num_experts encoder_ffn_dim num_experts_per_tok", {
        "encoder_sparse_step": 1, "decoder_layers": 1, "decoder_sparse_step": 1, "decoder_ffn_dim": 4,
        "num_experts_per_tok": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 1},
        ({"moe_token_dropout": 0.25}, {"router_bias": True}), model="ForConditionalGeneration", balance=True,
        named="nllb-moe"),
    Case("jetmoe", "JetMoe", "MoE", MIXTRAL, balance=True),
    Case("phimoe", "Phimoe", sizes=MIXTRAL, others=(
        {"router_jitter_noise": 0.2}, {"num_experts_per_tok": 2}), balance=True),
    Case("qwen2_moe", "Qwen2Moe", settings=GATED, others=NORM, balance=True),
    Case("qwen3_moe", "Qwen3Moe", others=NORM, balance=True),
    Case("olmoe", "Olmoe", sizes=PLAIN, others=NORM, balance=True),
    Case("granitemoe", "GraniteMoe", "MoE", MIXTRAL, balance=True),
    Case("flex_olmo", "FlexOlmo", sizes=PLAIN, others=NORM, balance=True),
    Case("mellum", "Mellum", others=NORM, balance=True),
    Case("qwen3_next", "Qwen3Next", settings=GATED, others=NORM, balance=True),
    text("qwen3_5_moe", "Qwen3_5Moe", settings=GATED, model="ForConditionalGeneration", balance=True),
    text("qwen4_exp", "Qwen4Exp", "TextSparseMoeBlock", settings=GATED, model="ForConditionalGeneration", balance=True),
    text("qwen3_vl_moe", "Qwen3VLMoe", "TextSparseMoeBlock", model="ForConditionalGeneration", balance=True),
    Case("qwen3_omni_moe", "Qwen3OmniMoe", "ThinkerTextSparseMoeBlock", others=NORM, balance=True, model="",
         nested="thinker_config.text_config", reason="the tiny vision, audio and speech models around it are not made"),
    Case("lara_mini", "LaraMini", settings=GATED, others=NORM, balance=True),
    Case("minimax", "MiniMax", sizes=MIXTRAL, balance=True),
    Case("jamba", "Jamba", sizes=PLAIN, balance=True),
    Case("hunyuan_v1_moe", "HunYuanMoEV1", "Moe", "num_experts intermediate_size moe_topk"),
    granite("granitemoeshared", "GraniteMoeShared"),
    granite("granitemoehybrid", "GraniteMoeHybrid", mamba_n_heads=2, layer_types=["linear_attention", FULL[0]]),
    granite("granitemoe_swa", "GraniteMoeSWA"),
    Case("aria", "AriaText", "MoELayer", "moe_num_experts intermediate_size moe_topk", {"moe_num_shared_experts": 2},
         nested="text_config", alone="aria_text"),
    v3("deepseek_v3", "DeepseekV3", settings=DENSE_FIRST),
    v3("deepseek_v32", "DeepseekV32", settings=DENSE_FIRST),
    v3("glm4_moe", "Glm4Moe", others=tuple({**a, **b} for a, b in zip(CLUSTERS, NORM, strict=True))),
    v3("glm4_moe_lite", "Glm4MoeLite"),
    v3("glm4v_moe", "Glm4vMoe", "TextMoE", nested="text_config", top=SEES, model="ForConditionalGeneration",
       balance=True),
    v3("glm_moe_dsa", "GlmMoeDsa", settings=DENSE_FIRST),
    v3("solar_open", "SolarOpen"),
    v3("dots1", "Dots1"),
    v3("dots3_note", "Dots3Note", "TextMoE", nested="text_config", top=ADAPTED, alone="dots3_note_text",
       settings={"shared_experts_intermediate_size": 5, "num_key_value_heads": 2}),
    v3("mimo_v2_flash", "MiMoV2Flash"),
    v3("axk2", "AXK2", others=({"n_group": None, "topk_group": None}, CLUSTERS[1])),
    Case("exaone_moe", "ExaoneMoe", "SparseMoEBlock", settings={"num_shared_experts": 2, **SCALED}, others=CLUSTERS),
    Case("kimi_linear", "KimiLinear", "MoE", LOCAL, {**SHARED, **DENSE_FIRST}, CLUSTERS),
    Case("bailing_hybrid", "BailingHybrid", "MoE", LOCAL, {**SHARED, **DENSE_FIRST}, CLUSTERS),
    Case("hy_v3", "HYV3", "MoE", settings={"num_shared_experts": 2, "router_scaling_factor": 1.7}),
    Case("afmoe", "Afmoe", settings={"num_shared_experts": 2, "route_scale": 1.7}),
    Case("beam", "Beam", "MoE", settings={**SCALED, "mlp_layer_types": ["dense", "sparse"]}, others=CLUSTERS),
    Case("minimax_m2", "MiniMaxM2", sizes=MIXTRAL, balance=True),
    Case("laguna", "Laguna", settings={**GATED, "moe_routed_scaling_factor": 1.7}, balance=True),
    Case("flint", "Flint", settings={**GATED, "mlp_only_layers": [0]}, others=NORM, balance=True),
    Case("lfm2_moe", "Lfm2Moe", settings={**SCALED, "num_dense_layers": 1, "layer_types": FULL}, others=BIAS),
    v3("mistral4", "Mistral4"),
    Case("gpt_oss", "GptOss", "MLP", MIXTRAL, {"swiglu_limit": 0.6}, balance=True),
    Case("openai_privacy_filter", "OpenAIPrivacyFilter", "MLP", MIXTRAL, {"swiglu_limit": 0.6},
         model="ForTokenClassification"),
    Case("llama4", "Llama4", "TextMoe", MIXTRAL, nested="text_config", alone="llama4_text"),
    v3("glm5_next", "Glm5NextText", nested="text_config", model="", reason=AROUND,
       settings={"swiglu_limit": 0.6, "num_key_value_heads": 2}, balance=True),
    Case("minimax_m3_vl", "MiniMaxM3VL", sizes=MIXTRAL, nested="text_config", alone="minimax_m3_vl_text",
         settings={**SCALED, "shared_intermediate_size": 4, "swiglu_limit": 0.6}, balance=True),
    v3("mistral_large4", "MistralLarge4Text", nested="text_config", model="", reason=AROUND),
    Case("dbrx", "Dbrx", "FFN", "moe_num_experts ffn_hidden_size moe_top_k", nested="ffn_config", of_whole=True,
         top=tuple({"d_model": sizes[0], **DBRX} for _, sizes in SHAPES),
         others=({"moe_normalize_expert_weights": 1.0}, {"moe_normalize_expert_weights": None}), balance=True),
    Case("kolibri1", "Kolibri1", sizes=LOCAL, settings=GATED, others=NORM),
    Case("ernie4_5_moe", "Ernie4_5_Moe", sizes="moe_num_experts moe_intermediate_size moe_k",
         settings={"moe_num_shared_experts": 2}, others=({}, {"moe_norm_min": 0.9}), seed=30, balance=True),
    Case("cohere2_moe", "Cohere2Moe", sizes=PLAIN, others=(
        {"num_shared_experts": 2, "expert_selection_fn": "sigmoid"},
        {"num_shared_experts": 1, "shared_expert_combination_strategy": "sum"})),
    Case("step3p7", "Step3p7", sizes=V3, nested="text_config", model="", reason=AROUND, settings={
        "share_expert_dim": 4, "moe_router_scaling_factor": 1.7, "pad_token_id": 0}, others=(
        {"swiglu_limits": [0.0, 0.5], "swiglu_limits_shared": [0.0, 0.3]},
        {"swiglu_limits": [0.5, 0.0], "swiglu_limits_shared": [0.3, 0.4]})),
    Case("deepseek_v4", "DeepseekV4", sizes=V3, settings={
        **SCALED, "swiglu_limit": 0.6, "mlp_layer_types": ["hash_moe", "moe"]}, balance=True),
    Case("longcat_flash", "LongcatFlash", "MoE", "n_routed_experts expert_ffn_hidden_size moe_topk",
         {"zero_expert_num": 2, "routed_scaling_factor": 1.7}, seed=11, spare="experts.gate_up_proj"),
    Case("nemotron_h", "NemotronH", "MoE", V3, {
        **SCALED, "moe_shared_expert_intermediate_size": 4, "layers_block_type": ["full_attention", "moe"]}, (
        {**CLUSTERS[0], "moe_latent_size": 5}, {**CLUSTERS[1], "moe_latent_size": None}), seed=13),
    Case("muse_spark", "MuseSpark", "MoE", LOCAL, {
        **SCALED, "moe_hidden_size": 5, "output_multiplier": 0.6, "post_norm_eps": 1e-3, "rms_norm_eps": 1e-2,
        "layer_rope_theta": [0, 0]},
        seed=11, nested="text_config", top=HEARS, model="",
        reason="the tiny vision and audio models around the text model are not made"),
    Case("gemma4", "Gemma4", "TextDecoderLayer", GEMMA_SIZES, {**GEMMA, "enable_moe_block": True}, nested="text_config",
         alone="gemma4_text", before="post_feedforward_layernorm"),
    Case("diffusion_gemma", "DiffusionGemma", "DecoderTextLayer", GEMMA_SIZES, GEMMA, nested="text_config",
         before="post_feedforward_layernorm", model="ForBlockDiffusion", top=({"vision_config": TOWER},) * 2),
    v3("axk1", "AXK1", settings={**DENSE_FIRST, "rms_norm_eps": 1e-2}),
    Case("inkling", "Inkling", "MoE", V3, {"n_shared_experts": 2, "route_scale": 1.7, **SMALL_INKLING},
         nested="text_config", named="inkling_mm_model", alone="inkling_text"),
    Case("inkling2", "Inkling2", "SparseMoeBlock", V3, {**SOFT_CAPS, **SMALL_INKLING}, nested="text_config",
         alone="inkling2_text", top=tuple({"vision_config": {"text_hidden_size": s[0]}} for _, s in SHAPES)),
    Case("inkling2_loop", "Inkling2Loop", "SparseMoeBlock", V3, {**SOFT_CAPS, **SMALL_INKLING}, nested="text_config",
         alone="inkling2_loop_text", top=tuple({"vision_config": {"text_hidden_size": s[0]}} for _, s in SHAPES)),
    Case("ernie4_5_vl_moe", "Ernie4_5_VLMoe", "MoeBlock", "moe_num_experts moe_intermediate_size moe_k", {
        "moe_num_shared_experts": 2, "mlp_layer_types": ["dense", "sparse"], "head_dim": 8, "rope_parameters": {
            "rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}}, twice="moe_intermediate_size",
        nested="text_config", model="ForConditionalGeneration", top=(ERNIE_SEES, ERNIE_SEES), seed=30, balance=True,
        unread="vision_moe."),
    v3("hy_v4", "HYV4", settings={"swiglu_limit": 0.6, "num_key_value_heads": 2}),
    v3("hy_v4_vl", "HYV4VL", nested="text_config", settings={"swiglu_limit": 0.6, "num_key_value_heads": 2}, model="",
       reason=AROUND),
    Case("zaya", "Zaya", others=(
        {"num_experts_per_tok": 1, "num_experts": 3, "router_hidden_size": 7},
        {"num_experts_per_tok": 1, "num_experts": 4, "router_hidden_size": 9}), state="router_hidden_size",
        seed=42),
    Case("doge", "Doge", "CDMoE", PLAIN, {"is_moe": True}, (
        {"num_experts": 4}, {"num_experts": 9}), balance=True),
    v3("deepseek_v2", "DeepseekV2", "Moe", others=GREEDY),
    v3("deepseek_ocr2", "DeepseekOcr2Text", "Moe", nested="text_config", settings=ONE_HEAD, others=GREEDY, model="",
       reason=AROUND),
    v3("unlimited_ocr", "UnlimitedOcrText", "Moe", nested="text_config", settings=ONE_HEAD, others=GREEDY, model="",
       reason=AROUND),
)}
