"""A contract in words, a line for each part."""

from collections.abc import Sequence
from functools import singledispatch

from jax_moe.config.models import DecoderConfig, MakeMoEConfig
from jax_moe.config.moe import CapacityConfig, MoEConfig, SoftMoEConfig

_PRIORITY = {
    "token": "in token order", "choice": "first choices first", "probability": "highest probability first",
    "batch": "tokens with the highest weight first, their first choices before all second choices",
}
_GROUP = {"batch": "the whole batch", "sequence": "one sequence"}

NORMS = {"rms_wide": "rms (rounded after the scale)", "rms_centered": "rms (the scale is 1 + what is stored)"}


@singledispatch
def describe(config: object) -> list[str]:
    """Lines that say what the layer or model of a contract does."""
    raise TypeError(f"config={type(config).__name__}: must be the contract of a layer or model")


@describe.register
def _makemoe(config: MakeMoEConfig) -> list[str]:
    model = (
        f"model: vocabulary {config.vocab_size}, block {config.block_size}, width {config.model_dim}, "
        f"{config.num_layers} layers of {config.num_heads} heads"
    )
    return [model, *_sparse(config.moe)]


@describe.register
def _sparse(config: MoEConfig) -> list[str]:
    router, expert = config.router, config.expert
    top = f"the best {config.top_k} of {config.num_experts}"
    order = f"{router.score} over all, then {top}"
    if router.order == "select_then_softmax":
        order = f"{top}, then softmax over them"
    if router.order == "sparse_mixer":
        near = f"at most {2 * router.mixer_eps:g} of its size below the best"
        order = f"{top}, each with its share of a softmax over what is left and {near} (sparse mixer)"
    if router.table_tokens:
        chosen = f"{config.top_k} of {config.num_experts}"
        order = f"a table of {router.table_tokens:,} tokens chooses {chosen}, their {router.score} scores weigh them"
    lines = [f"router: {order}" + (", with bias" if router.bias else "")]
    if router.input_norm:
        lines.append("router's input: x / rms(x) times a learned scale, over the root of its width")
    if router.logit_scale != 1:
        lines.append(f"logits: times {router.logit_scale:g}")
    if router.renormalise != "none":
        lines.append("weights: divided by their sum" + (f", times {router.scale:g}" if router.scale != 1 else ""))
    elif router.scale != 1:
        lines.append(f"weights: times {router.scale:g}")
    if router.network_dim:
        state = ", with the state of the mixture before" if router.takes_state else ""
        lines.append(f"router: a network of width {router.network_dim}{state}")
    if router.product_keys != "none":
        whose = "its own numbers" if router.product_keys == "own" else "the numbers of all tokens in a row"
        lines.append(f"router: product keys, each logit the sum of two of {whose}")
    if router.expert_scale:
        lines.append("weights: times a learned factor of each expert")
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
    does = "return their input" if config.identity_answer == "input" else "answer nothing"
    same = f" and {config.identity_experts} that {does}" if config.identity_experts else ""
    lines.append(
        f"experts: {config.num_networks}{same} of {config.inner_dim} -> {config.expert_dim} -> {config.inner_dim}, "
        f"{kind}, {'with' if expert.bias else 'no'} biases, dropout {expert.dropout:g}"
    )
    around = config.around
    if around.latent_dim:
        normed = "" if around.latent_norm == "none" else f" and normed ({around.latent_norm})"
        lines.append(f"experts' input: mapped to width {around.latent_dim}{normed}, and the answer back")
    norms = {
        "each expert's answer": expert.answer_norm, "the whole answer": around.output_norm,
        "what routed experts read": around.input_norm, "their weighted sum": around.routed_norm,
        "what the shared expert reads": around.shared_input_norm, "the shared expert's answer": around.shared_norm,
    }
    lines += [f"norm: of {what} ({kind})" for what, kind in norms.items() if kind != "none"]
    soft = {"gate": expert.gate_softcap, "up": expert.up_softcap}
    told = [f"{name} within {bound:g}" for name, bound in soft.items() if bound is not None]
    lines += [f"soft caps: {', '.join(told)}"] if told else []
    if router.learned_scale:
        lines.append("weights: times a number that is trained")
    if router.shared_experts:
        lines.append(f"shared experts: {router.shared_experts} of width {expert.shared_dim}, weighed by the router")
    elif expert.shared_dim:
        gate = ", behind a sigmoid gate" if expert.shared_gate else ""
        form = {"same": "", True: ", gated", False: ", not gated"}[expert.shared_gated]
        lines.append(f"shared expert: width {expert.shared_dim}{form}{gate}")
    if config.answer_bias:
        lines.append("answer: a bias is added to it")
    rule = config.capacity
    if config.balance.of != "choices":
        what = "softmax of the logits" if config.balance.of == "logits" else "scores"
        lines.append(f"balance loss: of the {what} and the top-k of them, not of the choices")
    if config.balance.counted_in == "sequence":
        lines.append("balance loss: of each sequence, then their mean")
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


@describe.register
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


@describe.register
def _decoder(config: DecoderConfig) -> list[str]:
    mixtures, dense = len(config.moe_layers), config.dense_layers
    kinds = f"{mixtures} with a mixture, {len(dense)} dense of width {config.dense_dim} ({numbers(dense)})"
    tied = ("tied head" if config.tied_embeddings else "untied head") + (" with bias" if config.head_bias else "")
    lines = [
        f"model: vocabulary {config.vocab_size:,}, width {config.model_dim:,}, {tied}, "
        f"up to {config.max_positions:,} positions",
        f"layers: {config.num_layers}, " + (kinds if dense else "each with a mixture"),
        *_attention(config),
    ]
    if (config.norm, config.norm_place) != ("rms", "before"):
        places = {
            "around": "before and after each half of a layer",
            "around_attention": "before and after attention, after the feed-forward network",
        }.get(config.norm_place, f"{config.norm_place} each half of a layer")
        kind = NORMS.get(config.norm, config.norm)
        lines.append(f"norms: {kind} norms {places}")
    if config.layer_scale:
        lines.append("layers: each multiplies the stream by a stored number, which is not trained")
    if config.logits_softcap is not None:
        lines.append(f"logits: softly capped, {config.logits_softcap:g} * tanh(logits / {config.logits_softcap:g})")
    multipliers = {
        "embeddings times": config.embedding_multiplier, "residual branches times": config.residual_multiplier,
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
    """A line per kind of attention and subject; a phrase of only some layers of the kind names these layers."""
    kinds: dict[str, dict[int, dict[str, list[str]]]] = {}
    for i, layer in enumerate(config.layers):
        kinds.setdefault(layer.attention.kind, {})[i] = layer.attention.words()
    lines = []
    for said in kinds.values():
        of = "" if len(kinds) == 1 else f" of {numbers(list(said))}"
        phrases: dict[str, dict[str, list[int]]] = {}
        for i, words in said.items():
            for subject, phrase in ((subject, phrase) for subject, each in words.items() for phrase in each):
                phrases.setdefault(subject, {}).setdefault(phrase, []).append(i)
        lines += [
            f"{subject}{of}: " + ", ".join(
                phrase if len(where) == len(said) else f"{phrase} in {numbers(where)}"
                for phrase, where in found.items()
            )
            for subject, found in phrases.items()
        ]
    return lines


def numbers(layers: Sequence[int]) -> str:
    """Layer numbers, the first few."""
    more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers[:8])) + more
