"""Tiny random models of every Hugging Face family, and the reference run of `transformers`."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jax_moe.config.decoder import DecoderConfig
from jax_moe.porting.families.family import Family
from moe_parity.sides.hooks import first, watching

VOCABULARY, TEXTS, LENGTH = 37, 3, 11
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **NO_TOKENS}


@dataclass(frozen=True)
class Case:
    """A model: its family, its sizes, and the side on which texts are padded."""

    name: str
    family: str  # the prefix of the classes in transformers
    sizes: dict[str, Any]
    padding: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    text: str = ""  # "Text" if the configuration is that of a text model by itself
    # Of AdamW, whose steps move a weight with a tiny gradient as far as any other. Gated delta nets amplify that: their
    # losses of twenty steps at 3e-3 differ by 1e-4 in fp32, and by 2e-13 in fp64
    learning_rate: float = 3e-3
    draws: bool = False  # whether the reference draws its choices in training: it then runs as at evaluation
    mend: Callable[[Any], object] = lambda model: None  # what is wrong in the reference, put right

    def config(self) -> Any:
        """transformers' configuration, with a balance loss large enough to matter."""
        import transformers  # docs/parity.md is rendered without it

        values = {**COMMON, "output_router_logits": True, "router_aux_loss_coef": 0.1, **self.sizes, **self.settings}
        return getattr(transformers, f"{self.family}{self.text}Config")(**values)

    def reference(self, config: Any) -> Any:
        """The model with eager attention and experts."""
        import transformers

        kind = getattr(transformers, f"{self.family}ForCausalLM")
        model = kind._from_config(config, attn_implementation="eager", experts_implementation="eager")
        self.mend(model)
        return model.train(not self.draws)


def sizes(D: int, H: int, J: int, L: int, **own: Any) -> dict[str, Any]:
    """The sizes that all families call by the same names."""
    return {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": J, "num_hidden_layers": L, **own}


def rope(kind: str, **own: Any) -> dict[str, Any]:
    """Rotary settings."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **own}}


MIXTRAL = {"intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2}
QWEN2 = {
    "intermediate_size": 18, "moe_intermediate_size": 14, "shared_expert_intermediate_size": 10, "num_experts": 6,
    "num_experts_per_tok": 3,
}
QWEN3 = {"intermediate_size": 18, "moe_intermediate_size": 14, "num_experts": 7, "num_experts_per_tok": 3}
OLMOE = {"intermediate_size": 14, "num_experts": 6, "num_experts_per_tok": 3}
GRANITE = {"intermediate_size": 14, "num_local_experts": 5, "num_experts_per_tok": 2}
V3 = {
    "intermediate_size": 18, "moe_intermediate_size": 14, "n_shared_experts": 2, "n_routed_experts": 6,
    "num_experts_per_tok": 3,
}
CLUSTERS = {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7}
EXAONE = {
    "intermediate_size": 18, "moe_intermediate_size": 14, "num_shared_experts": 2, "num_experts": 6,
    "num_experts_per_tok": 3,
}
ERNIE = {
    "intermediate_size": 18, "moe_intermediate_size": 14, "moe_num_shared_experts": 2, "moe_num_experts": 6, "moe_k": 3,
}
HUNYUAN = {"intermediate_size": 14, "num_experts": 6, "moe_topk": 3}
LATENT = {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
LLAMA4 = {"intermediate_size": 14, "intermediate_size_mlp": 18, "num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {"short_factor": [1.0, 1.5, 2.5], "long_factor": [1.5, 3.0, 6.0], "short_mscale": 1.1, "long_mscale": 1.3}


def long_factors(model: Any) -> None:
    """Phi's rotation of long texts with the long factors, which transformers 5.24 does not take."""
    turns, most = model.model.rotary_emb, model.config.rope_parameters["original_max_position_embeddings"]
    turns.rope_init_fn = functools.partial(turns.rope_init_fn, seq_len=most + 1)


GEMMA4 = {
    "intermediate_size": 10, "moe_intermediate_size": 14, "num_experts": 5, "top_k_experts": 2,
    "enable_moe_block": True, "hidden_size_per_layer_input": 0,
}
NEXT = {
    "moe_intermediate_size": 14, "shared_expert_intermediate_size": 10, "num_experts": 6, "num_experts_per_tok": 3,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 3,
}
NET, WHOLE = "linear_attention", "full_attention"
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 1.7
}
CASES = [
    Case("mixtral", "Mixtral", sizes(24, 4, 2, 2, **MIXTRAL)),
    Case("mixtral_window", "Mixtral", sizes(30, 5, 1, 3, **MIXTRAL, head_dim=6), "left", {"sliding_window": 3}),
    Case("mixtral_tied", "Mixtral", sizes(22, 3, 3, 2, **MIXTRAL, head_dim=8), "right",
         {"tie_word_embeddings": True, **rope("linear", factor=4.0)}),
    Case("qwen2_moe", "Qwen2Moe", sizes(24, 4, 2, 3, **QWEN2), settings={"mlp_only_layers": [0]}),
    Case("qwen2_moe_window", "Qwen2Moe", sizes(30, 5, 5, 4, **QWEN2), "right",
         {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3}),
    Case("qwen2_moe_tied", "Qwen2Moe", sizes(20, 2, 1, 2, **QWEN2), "left",
         {"tie_word_embeddings": True, "norm_topk_prob": True, "qkv_bias": False, "max_position_embeddings": 6,
          **rope("dynamic", factor=2.0)}),
    Case("qwen3_moe", "Qwen3Moe", sizes(24, 4, 2, 2, **QWEN3, head_dim=10), settings={"norm_topk_prob": True}),
    Case("qwen3_moe_window", "Qwen3Moe", sizes(18, 3, 3, 2, **QWEN3, head_dim=6), "left",
         {"use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": True}),
    Case("qwen3_moe_dense", "Qwen3Moe", sizes(26, 4, 1, 3, **QWEN3, head_dim=8), "right",
         {"mlp_only_layers": [1], "attention_bias": True,
          **rope("yarn", factor=4.0, original_max_position_embeddings=16)}),
    Case("olmoe", "Olmoe", sizes(24, 4, 4, 2, **OLMOE)),
    Case("olmoe_clipped", "Olmoe", sizes(28, 7, 1, 3, **OLMOE), "left", {"clip_qkv": 0.8}),
    Case("olmoe_tied", "Olmoe", sizes(24, 4, 2, 2, **OLMOE), "right",
         {"tie_word_embeddings": True, "norm_topk_prob": True, "attention_bias": True, **rope(
             "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)}),
    Case("granitemoe", "GraniteMoe", sizes(24, 4, 2, 2, **GRANITE), settings=MULTIPLIERS),
    Case(
        "granitemoe_tied", "GraniteMoe", sizes(30, 3, 1, 3, **GRANITE), "left",
        {**MULTIPLIERS, "tie_word_embeddings": True},
    ),
    Case(
        "granitemoe_bias", "GraniteMoe", sizes(22, 1, 1, 2, **GRANITE), "right", {**MULTIPLIERS, "attention_bias": True}
    ),
    Case("phimoe", "Phimoe", sizes(24, 4, 2, 2, **MIXTRAL), "left", {
        "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2,
        **rope("longrope", original_max_position_embeddings=16, **LONGROPE)}, draws=True),
    Case("phimoe_long", "Phimoe", sizes(18, 3, 1, 2, **MIXTRAL), "right", {
        "tie_word_embeddings": True, "lm_head_bias": True, "sliding_window": 5,
        **rope("longrope", original_max_position_embeddings=4, **LONGROPE)}, draws=True, mend=long_factors),
    Case("glm4_moe", "Glm4Moe", sizes(24, 4, 2, 3, **V3, head_dim=12), "left",
         {**CLUSTERS, "use_qk_norm": True, "attention_bias": True}),
    Case("dots1", "Dots1", sizes(24, 4, 2, 2, **V3, head_dim=6), "right",
         {**CLUSTERS, "attention_bias": True, "first_k_dense_replace": 1, "sliding_window": 3, "max_window_layers": 1}),
    Case("solar_open", "SolarOpen", sizes(22, 4, 1, 2, **V3, head_dim=6), "left", {**CLUSTERS, "attention_bias": True}),
    Case("minimax_m2", "MiniMaxM2", sizes(24, 4, 2, 2, **MIXTRAL, head_dim=8), "right", {"rotary_dim": 4, **NO_TOKENS}),
    Case("flex_olmo", "FlexOlmo", sizes(24, 4, 2, 2, **OLMOE), "left", {"norm_topk_prob": True, **NO_TOKENS}),
    Case("granitemoeshared", "GraniteMoeShared", sizes(20, 2, 2, 2, **GRANITE), "right",
         {**MULTIPLIERS, "shared_intermediate_size": 10}),
    Case("exaone_moe", "ExaoneMoe", sizes(24, 4, 2, 3, **EXAONE, head_dim=6), "left",
         {**CLUSTERS, "sliding_window": 3, "sliding_window_pattern": 2}),
    Case("ernie4_5_moe", "Ernie4_5_Moe", sizes(24, 4, 2, 2, **ERNIE, head_dim=6), "right", {"moe_norm_min": 0.3}),
    Case("hunyuan_v1_moe", "HunYuanMoEV1", sizes(24, 4, 2, 2, **HUNYUAN, head_dim=6), "left",
         {"attention_bias": True, **rope("dynamic", factor=1.0, alpha=10.0)}),
    Case("deepseek_v2", "DeepseekV2", sizes(24, 4, 4, 2, **V3, **LATENT), "left",
         {**CLUSTERS, "topk_method": "group_limited_greedy", "q_lora_rank": None, "attention_bias": True}),
    Case("deepseek_v3", "DeepseekV3", sizes(24, 4, 4, 3, **V3, **LATENT), "right",
         {**CLUSTERS, "first_k_dense_replace": 1, "q_lora_rank": 7, **rope(
             "yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3)}),
    Case("glm4_moe_lite", "Glm4MoeLite", sizes(22, 3, 3, 2, **V3, **LATENT), "left",
         {"q_lora_rank": 7, "rope_interleave": False, "attention_bias": True}),
    Case("mistral4", "Mistral4", sizes(24, 4, 4, 2, **V3, **LATENT), "right",
         {"q_lora_rank": 7, **rope("yarn", factor=4.0, original_max_position_embeddings=4, mscale=1.0,
                                   mscale_all_dim=1.0, llama_4_scaling_beta=0.3)}),
    Case("gpt_oss", "GptOss", sizes(24, 4, 2, 2, **MIXTRAL, head_dim=10), "left", {
        "swiglu_limit": 0.6, "sliding_window": 3,
        **rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)}),
    Case("llama4", "Llama4", sizes(24, 4, 2, 2, **LLAMA4, head_dim=8), "left", {
        "num_experts_per_tok": 1, "no_rope_layers": [1, 0], "attention_chunk_size": 4, "floor_scale": 2,
        "attn_scale": 1.5}, "Text"),
    Case("llama4_dense", "Llama4", sizes(22, 3, 1, 3, **LLAMA4, head_dim=6), "right", {
        "moe_layers": [1, 2], "no_rope_layers": [1, 1, 1], "attention_chunk_size": 3, "use_qk_norm": False,
        "layer_types": ["full_attention", "chunked_attention", "chunked_attention"], "attention_bias": True,
        "attn_temperature_tuning": False, "tie_word_embeddings": True, **rope(
            "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)},
         "Text"),
    Case("gemma4", "Gemma4", sizes(24, 4, 2, 2, **GEMMA4, head_dim=6), "left", {
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8, "sliding_window": 3,
        "attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 5.0}, "Text"),
    Case("gemma4_whole", "Gemma4", sizes(22, 3, 1, 3, **GEMMA4, head_dim=6), "right", {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "global_head_dim": 12,
        "tie_word_embeddings": False, "attention_bias": True, "sliding_window": 4, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {
                "rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "factor": 2.0}}},
         "Text"),
    Case("qwen3_next", "Qwen3Next", sizes(24, 4, 2, 3, **NEXT, head_dim=8), "left", {
        "layer_types": [NET, WHOLE, NET], "mlp_only_layers": [1], "intermediate_size": 18, "attention_bias": True},
         learning_rate=3e-4),
    Case("qwen3_5_moe", "Qwen3_5Moe", sizes(22, 3, 1, 2, **NEXT, head_dim=16), "right", {
        "layer_types": [WHOLE, NET], "tie_word_embeddings": True,
        **rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True)}, "Text",
         learning_rate=3e-4),
]


def draw_weights(model: Any, seed: int) -> None:
    """Draws weights: norms about 1 (0 where that is their 1), biases not 0, routers that spread the tokens."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        untrained = ("correction_bias", "layer_scalar")
        kept = {name: value for name, value in model.state_dict().items() if name.endswith(untrained)}
        for name, parameter in sorted((dict(model.named_parameters()) | kept).items()):
            drawn = generator.normal(size=tuple(parameter.shape))
            if parameter.ndim == 1 or name in kept:
                drawn = drawn * 0.2 + (0.0 if name.endswith("bias") or not parameter.any() else 1.0)
            elif "embed_tokens" not in name:
                routes = name.endswith(("gate.weight", "router.weight", "router.proj.weight"))
                drawn *= (3.0 if routes else 1.0) * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.from_numpy(drawn))


def case_folder(name: str, folder: Path, **sizes: Any) -> Path:
    """A folder that transformers wrote of the case of that name, with these sizes and drawn weights."""
    case = next(case for case in CASES if case.name == name)
    case = replace(case, sizes=case.sizes | sizes)
    reference = case.reference(case.config())
    draw_weights(reference, seed=1)
    return save_reference(reference, folder)


def batch(case: Case, seed: int) -> dict[str, np.ndarray]:
    """Texts with mask and labels; a label counts if it and the token before it are no padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, (TEXTS, LENGTH))
    mask = np.ones((TEXTS, LENGTH), bool)
    if case.padding == "left":
        mask[1, :4], mask[2, :1] = False, False
    elif case.padding == "right":
        mask[1, -4:], mask[2, -1:] = False, False
    before = np.concatenate([np.zeros((TEXTS, 1), bool), mask[:, :-1]], axis=1)
    return {"tokens": tokens, "mask": mask, "labels": np.where(mask & before, tokens, -100)}


def run_reference(model: Any, batch: dict[str, np.ndarray]) -> Any:
    """transformers' output with loss and router logits; padded texts have a mask."""
    mask = None if batch["mask"].all() else torch.from_numpy(batch["mask"].astype(np.int64))
    tokens, labels = torch.from_numpy(batch["tokens"]), torch.from_numpy(batch["labels"])
    return model(tokens, attention_mask=mask, labels=labels, use_cache=False)


@contextmanager
def watching_routers(model: Any, config: DecoderConfig, family: Family) -> Iterator[list[tuple[Any, Any]]]:
    """What the routers say, mixture by mixture: the scores that they rank, and the chosen experts."""
    found: list[tuple[Any, Any]] = []
    assert family.mixture is not None
    names, ranked = family.mixture.in_memory, list[Any]()
    router, experts = (
        next(row.theirs for row in names.rows if row.ours == ours).rpartition(".")[0]
        for ours in ("router.kernel", "experts.down")
    )
    with watching() as watch:
        for i, contract in zip(config.moe_layers, config.mixtures, strict=True):
            mixture = model.get_submodule(names.within.format(l=i)[:-1])
            bias = [value for name, value in mixture.state_dict().items() if name.endswith("correction_bias")]

            def routed(answer: Any, *_: Any, score: str = contract.router.score, bias: list = bias) -> None:
                scores = first(answer).detach()
                if bias:
                    scores = (scores.sigmoid() if score == "sigmoid" else scores.softmax(-1)) + bias[0].squeeze()
                ranked.append(scores)

            def chose(answer: Any, *_: Any, K: int = contract.top_k) -> None:
                logits = answer[1].detach()  # Llama 4 hands out its scores, and gives its experts no choices
                found.append((logits, logits.topk(K, dim=-1).indices))

            if contract.expert.weight_on == "input":
                watch.out_of(mixture.get_submodule(router), chose)
                continue
            watch.out_of(mixture.get_submodule(router), routed)
            watch.out_of(mixture.get_submodule(experts), lambda y, x, index, *_: found.append((ranked[-1], index)))
        yield found


def reference_choices(routed: list[tuple[Any, Any]], mask: np.ndarray) -> tuple[np.ndarray, float]:
    """The experts [L, tokens, K] of every mixture, and the smallest score gap; without padding."""
    real = torch.from_numpy(mask)
    scores, chosen = (
        torch.stack([layer.reshape(*mask.shape, -1)[real] for layer in each]) for each in zip(*routed, strict=True)
    )
    values = torch.sort(scores, dim=-1, descending=True, stable=True).values
    gap = (values[..., :-1] - values[..., 1:])[..., : chosen.shape[-1]].min()
    return chosen.numpy(), float(gap)


def save_reference(model: Any, folder: Path, fused: bool = False) -> Path:
    """A folder that transformers writes: under the family's names or, `fused`, those in memory."""
    model.save_pretrained(folder, save_original_format=not fused)
    return folder
