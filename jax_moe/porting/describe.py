"""A contract in words, one line a part."""

from jax_moe.config import CapacityConfig, MakeMoEConfig, MoEConfig, SoftMoEConfig

_PRIORITY = {
    "token": "in token order", "choice": "first choices first", "probability": "highest probability first",
}
_GROUP = {"batch": "the whole batch", "sequence": "one sequence"}


def describe(config: MakeMoEConfig | MoEConfig | SoftMoEConfig) -> list[str]:
    """What the layer or model does, for people."""
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
    order = f"{router.score} over all, then {top}" if router.order == "score_then_select" else f"{top}, then softmax over them"
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
    lines.append("capacity: " + ("none, nothing is dropped" if config.capacity is None else _capacity(config, config.capacity)))
    kind = f"gated {expert.activation}" if expert.gated else expert.activation
    lines.append(
        f"experts: {config.num_experts} of {config.model_dim} -> {config.expert_dim} -> {config.model_dim}, {kind}, "
        f"{'with' if expert.bias else 'no'} biases, dropout {expert.dropout:g}"
    )
    if expert.shared_dim:
        lines.append(f"shared expert: width {expert.shared_dim}" + (", behind a sigmoid gate" if expert.shared_gate else ""))
    return lines


def _capacity(config: MoEConfig, rule: CapacityConfig) -> str:
    k = "K " if rule.counts_top_k else ""
    group = _GROUP.get(rule.group, f"groups of {rule.group_size} tokens")
    return f"{rule.rounding}(tokens {k}/ experts * {rule.factor}) slots an expert over {group}, {_PRIORITY[rule.priority]}"


def _soft(config: SoftMoEConfig) -> list[str]:
    widths = " -> ".join(map(str, config.widths))
    norms = [name for name, on in (("hidden", config.layer_norm), ("output", config.output_layer_norm)) if on]
    return [
        f"slots: {config.num_experts} experts of {config.num_slots}; every slot mixes all tokens (not for causal models)",
        f"experts: {widths}, hidden {config.hidden_activation}, output {config.output_activation}, "
        f"layer norm: {' and '.join(norms) or 'none'}, {'with' if config.residual else 'no'} residual",
    ]
