"""A contract in words, a line for each part."""

from collections.abc import Sequence

from jax_moe.config.attention import RopeConfig
from jax_moe.config.models import DecoderConfig, MakeMoEConfig
from jax_moe.config.moe import CapacityConfig, MoEConfig, SoftMoEConfig

_PRIORITY = {
    "token": "in token order", "choice": "first choices first", "probability": "highest probability first",
    "batch": "tokens with the highest weight first, their first choices before all second choices",
}
_GROUP = {"batch": "the whole batch", "sequence": "one sequence"}


def describe(config: MakeMoEConfig | MoEConfig | SoftMoEConfig | DecoderConfig) -> list[str]:
    """Lines that say what the layer or model does."""
    if isinstance(config, DecoderConfig):
        return _decoder(config)
    if isinstance(config, SoftMoEConfig):
        return _soft(config)
    if isinstance(config, MakeMoEConfig):
        model = (
            f"model: vocabulary {config.vocab_size}, block {config.block_size}, width {config.model_dim}, "
            f"{config.num_layers} layers of {config.num_heads} heads"
        )
        return [model, *_sparse(config.moe)]
    return _sparse(config)


def _sparse(config: MoEConfig) -> list[str]:
    router, expert = config.router, config.expert
    top = f"the best {config.top_k} of {config.num_experts}"
    order = f"{router.score} over all, then {top}"
    if router.order == "select_then_softmax":
        order = f"{top}, then softmax over them"
    lines = [f"router: {order}" + (", with bias" if router.bias else "")]
    if router.renormalise != "none":
        lines.append("weights: divided by their sum" + (f", times {router.scale:g}" if router.scale != 1 else ""))
    if router.correction_bias:
        lines.append("selection: scores plus a correction bias that no gradient trains")
    if router.num_clusters > 1:
        lines.append(f"clusters: the best {router.top_clusters} of {router.num_clusters}")
    if router.noise != "none":
        learned = router.noise == "learned_gaussian"
        kind = "learned softplus noise on the logits" if learned else f"input jitter {router.jitter_eps:g}"
        lines.append(f"noise: {kind}, {'also' if router.noise_at_evaluation else 'not'} at evaluation")
    capacity = "none, nothing is dropped" if config.capacity is None else _capacity(config, config.capacity)
    lines.append(f"capacity: {capacity}")
    kind = f"gated {expert.activation}" if expert.gated else expert.activation
    lines.append(
        f"experts: {config.num_experts} of {config.model_dim} -> {config.expert_dim} -> {config.model_dim}, {kind}, "
        f"{'with' if expert.bias else 'no'} biases, dropout {expert.dropout:g}"
    )
    if expert.shared_dim:
        gate = ", behind a sigmoid gate" if expert.shared_gate else ""
        lines.append(f"shared expert: width {expert.shared_dim}{gate}")
    rule = config.capacity
    if config.balance.counted_in == "group" and rule is not None and rule.group != "batch":
        each = "sequence" if rule.group == "sequence" else f"{rule.group_size} tokens"
        lines.append(f"balance loss: of each {each}, then their mean")
    return lines


def _capacity(config: MoEConfig, rule: CapacityConfig) -> str:
    k = "K " if rule.counts_top_k else ""
    group = _GROUP.get(rule.group, f"groups of {rule.group_size} tokens")
    if rule.slots is not None:
        return f"{rule.slots} slots per expert over {group}, however long, {_PRIORITY[rule.priority]}"
    if rule.exact_factor * (config.top_k if rule.counts_top_k else 1) >= config.num_experts:
        return f"a slot for every token of {group}, nothing is dropped"
    slots = f"{rule.rounding}(tokens {k}/ experts * {rule.factor}) slots per expert"
    return f"{slots} over {group}, {_PRIORITY[rule.priority]}"


def _soft(config: SoftMoEConfig) -> list[str]:
    widths = " -> ".join(map(str, config.widths))
    norms = [name for name, on in (("hidden", config.layer_norm), ("output", config.output_layer_norm)) if on]
    return [
        f"slots: {config.num_experts} experts of {config.num_slots}; "
        "every slot mixes all tokens (not for causal models)",
        *(["logits: tokens and phi of unit length, times a learned scale"] if config.normalise else []),
        f"experts: {widths}, hidden {config.hidden_activation}, output {config.output_activation}, "
        f"layer norm: {' and '.join(norms) or 'none'}, {'with' if config.residual else 'no'} residual",
    ]


def _decoder(config: DecoderConfig) -> list[str]:
    mixtures, dense = len(config.moe_layers), config.dense_layers
    kinds = f"{mixtures} with a mixture, {len(dense)} dense of width {config.dense_dim} ({numbers(dense)})"
    tied = "the head is the embedding" if config.tied_embeddings else "a head of its own"
    lines = [
        f"model: vocabulary {config.vocab_size:,}, width {config.model_dim:,}, {tied}, "
        f"up to {config.max_positions:,} positions",
        f"layers: {config.num_layers}, " + (kinds if dense else "each with a mixture"),
        "attention: " + ", ".join(_attention(config)),
        f"positions: {_rope(config.rope)}",
    ]
    multipliers = {
        "embeddings times": config.embedding_multiplier, "each half of a block times": config.residual_multiplier,
        "logits divided by": config.logits_divisor,
    }
    told = [f"{what} {value:g}" for what, value in multipliers.items() if value != 1]
    if told:
        lines.append("multipliers: " + ", ".join(told))
    balance, router = config.moe.balance, config.moe.router
    averaged = balance.pooled == "over_layers"
    pooled = "f and P averaged over the layers first" if averaged else "the mean of the layers' losses"
    sums = "the top-k" if balance.f_sums_to == "k" else "1"
    wide = ["in fp32" if kept == "float32" else "in the model's dtype" for kept in (router.dtype, router.weight_dtype)]
    return [
        *lines, *_sparse(config.moe), f"precision: router {wide[0]}, its weights {wide[1]}",
        f"balance loss: E * sum(f * P), f summing to {sums}, {pooled}, weight {config.balance_loss_weight:g}",
    ]


def _attention(config: DecoderConfig) -> list[str]:
    H, J = config.num_heads, config.num_kv_heads
    shared = "keys and values of their own" if H == J else f"each key and value head serving {H // J}"
    lines = [f"{H} heads of width {config.head_dim}, {shared}", f"scores times {config.score_scale:.6g}"]
    if config.sliding_window is not None:
        slides = config.sliding_layers
        where = "all layers" if len(slides) == config.num_layers else numbers(slides)
        lines.append(f"a window of {config.sliding_window:,} positions in {where}")
    biases = [
        name for name, on in (("queries, keys and values", config.qkv_bias), ("the output", config.output_bias)) if on
    ]
    lines += [f"biases on {' and '.join(biases)}"] if biases else []
    norms = {
        "per_head": "each head's queries and keys normed",
        "full_width": "queries and keys normed over their full width",
    }
    lines += [norms[config.qk_norm]] if config.qk_norm != "none" else []
    lines += [f"queries, keys and values clipped to +-{config.clip_qkv:g}"] if config.clip_qkv is not None else []
    return lines


def _rope(rope: RopeConfig) -> str:
    words = f"rotary, base {rope.theta:,.0f}"
    if rope.kind == "default":
        return words
    trained = f" from {rope.original_max_positions:,} positions" if rope.original_max_positions else ""
    return f"{words}, stretched {rope.factor:g} times{trained} ({rope.kind})"


def numbers(layers: Sequence[int]) -> str:
    """Layer numbers, the first few."""
    more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers[:8])) + more
