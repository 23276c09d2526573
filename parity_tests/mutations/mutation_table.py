"""The mutations: a file, a text that it has exactly once, the replacement, and the checks that must catch it.

Long because it is one table and nothing else: a row a mutation, in the order of the files.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A planted fault and what must catch it: rows and columns of the parity table, a Hugging Face family, or tests."""

    name: str
    file: str
    old: str
    new: str
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()  # none: those in fp64
    family: str = ""
    tests: tuple[str, ...] = ()
    reason: str = ""  # why it is known to survive


CONTRACT = ("parity_tests/layers/test_contract.py::test_capacity",)
PRESET = ("parity_tests/layers/test_presets.py::test_preset",)
CLAMP = "::test_clamped_experts_and_their_gradient_at_the_bound"
OVERFLOW = ("overflow, choice order",)

CONFIG = [
    Mutation(
        "capacity rounds up in place of down",
        "jax_moe/config/moe.py",
        'if rule.rounding == "ceil" and',
        'if rule.rounding == "floor" and',
        tests=CONTRACT,
    ),
    Mutation(
        "capacity ignores top-k",
        "jax_moe/config/moe.py",
        "(self.top_k if rule.counts_top_k else 1)",
        "(1 if rule.counts_top_k else self.top_k)",
        tests=CONTRACT,
    ),
    Mutation(
        "capacity's multiple rounds down",
        "jax_moe/config/moe.py",
        "-(-slots // rule.multiple)",
        "(slots // rule.multiple)",
        tests=CONTRACT,
    ),
    Mutation(
        "capacity's minimum is a maximum", "jax_moe/config/moe.py", "slots = max(-(-slots", "slots = min(-(-slots",
        tests=CONTRACT,
    ),
    Mutation(
        "the factor is the nearest double",
        "jax_moe/config/moe.py",
        "        return Fraction(text)",
        "        return Fraction(float(text))",
        tests=CONTRACT,
    ),
    Mutation(
        "capacity is not clamped to S",
        "jax_moe/config/moe.py",
        "slots = min(slots, group_size)\n        if",
        "slots = max(slots, 0)\n        if",
        tests=CONTRACT,
    ),
    Mutation(
        "scores are scaled by the wrong width",
        "jax_moe/config/attention.py",
        'if self.scale == "head_dim" else',
        'if self.scale != "head_dim" else',
        tests=("parity_tests/layers/test_contract.py::test_attention_scales",),
    ),
    Mutation(
        "mixtral does not renormalise",
        "jax_moe/presets.py",
        'renormalise="sum", dtype="input", noise',
        'renormalise="none", dtype="input", noise',
        tests=PRESET,
    ),
    Mutation(
        "makemoe selects after the softmax",
        "jax_moe/config/moe.py",
        'order="select_then_softmax", bias=True,\n',
        "bias=True,\n",
        tests=PRESET,
    ),
]

JAX_ROUTING = [
    Mutation(
        "jax: the router's bias is subtracted",
        "jax_moe/routing.py",
        "logits_GSE += bias_E",
        "logits_GSE -= bias_E",
        rows=("plain top-k",),
    ),
    Mutation(
        "jax: noise without softplus",
        "jax_moe/routing.py",
        "return jax.nn.softplus(noise_logits_GSE)",
        "return noise_logits_GSE",
        rows=("noisy top-k",),
    ),
    Mutation(
        "jax: softmax over tokens",
        "jax_moe/routing.py",
        "return jax.nn.softmax(logits_GSE, axis=-1)",
        "return jax.nn.softmax(logits_GSE, axis=1)",
        rows=("mixtral",),
    ),
    Mutation(
        "jax: sigmoid becomes its own square",
        "jax_moe/routing.py",
        "return jax.nn.sigmoid(logits_GSE)",
        "return jax.nn.sigmoid(logits_GSE) ** 2",
        rows=("deepseek_v3",),
    ),
    Mutation(
        "jax: the root of softplus is left out",
        "jax_moe/routing.py",
        "jnp.sqrt(jnp.where(score_GSE > 0, score_GSE, 1))",
        "jnp.where(score_GSE > 0, score_GSE, 1)",
        rows=("sqrt-softplus scores",),
    ),
    Mutation(
        "jax: the worst experts are chosen",
        "jax_moe/top_k.py",
        "key = jnp.where(bits < 0, bits ^ largest, bits)",
        "key = -jnp.where(bits < 0, bits ^ largest, bits)",
        rows=("mixtral",),
    ),
    Mutation(
        "jax: a cluster's score is its best alone",
        "jax_moe/routing.py",
        "jax.lax.top_k(score_GSNe, 2)[0].sum",
        "jax.lax.top_k(score_GSNe, 1)[0].sum",
        rows=("deepseek_v3", "bf16-rounded logits, clusters"),
    ),
    Mutation(
        "jax: the correction bias stays in the weights",
        "jax_moe/routing.py",
        "return Routing(expert_GSK, choice_weights(score_GSE, expert_GSK, config.router), logits_GSE, own_GSK)",
        "score_GSE = score_GSE + (0 if correction_bias_E is None else correction_bias_E)\n"
        "    return Routing(expert_GSK, choice_weights(score_GSE, expert_GSK, config.router), logits_GSE, own_GSK)",
        rows=("deepseek_v3",),
    ),
    Mutation(
        "jax: the scale is left out",
        "jax_moe/routing.py",
        "return weight_GSK * config.scale",
        "return weight_GSK",
        rows=("deepseek_v3",),
    ),
    Mutation(
        "jax: a zero sum divides",
        "jax_moe/routing.py",
        "jnp.where(total == 0, jnp.ones_like(total), total)",
        "total",
        rows=("overflow, token order, renormalised", "no slot at all", "every token padded"),
    ),
    Mutation(
        "jax: scores in the input's dtype",
        "jax_moe/dims.py",
        "return jnp.promote_types(dtype, jnp.float32)",
        "return jnp.dtype(dtype)",
        tests=("parity_tests/precision/test_precision.py",),
    ),
]

JAX_LAYERS = [
    Mutation(
        "jax: exact gelu becomes tanh's", "jax_moe/activations.py", "approximate=False", "approximate=True",
        rows=("weight on input",),
    ),
    Mutation(
        "jax: quick gelu with 1.7",
        "jax_moe/activations.py",
        "x * jax.nn.sigmoid(1.702 * x)",
        "x * jax.nn.sigmoid(1.7 * x)",
        rows=("gpt_oss",),
    ),
    Mutation(
        "jax: the clamp leaves out the lower bound",
        "jax_moe/experts.py",
        "-clamp_above(-clamp_above(up_ECF, config.clamp), config.clamp)",
        "clamp_above(up_ECF, config.clamp)",
        tests=("parity_tests/layers/test_pencil.py" + CLAMP,),
    ),
    Mutation(
        "jax: the clamp of the activation acts on the gate",
        "jax_moe/experts.py",
        'config.clamp_on == "gate":',
        "config.clamp_on:",
        tests=("parity_tests/layers/test_pencil.py::test_other_clamps",),
    ),
    Mutation(
        "torch: the clamp of the activation acts on the gate",
        "torch_ref/experts.py",
        'before = config.clamp if config.clamp_on == "gate" else None',
        "before = config.clamp",
        tests=("parity_tests/layers/test_pencil_torch.py::test_other_clamps",),
    ),
    Mutation(
        "the shared expert has the routed experts' clamp",
        "jax_moe/config/moe.py",
        'clamp = self.clamp if self.shared_clamp == "same" else self.shared_clamp',
        "clamp = self.clamp",
        tests=("parity_tests/layers/test_pencil.py::test_other_clamps",),
    ),
    Mutation(
        "jax: the shared expert's scale is left out",
        "jax_moe/moe.py",
        "y_GSD *= self.config.expert.shared_scale",
        "pass",
        rows=("clamped activation",),
    ),
    Mutation(
        "jax: experts that return their input have a queue",
        "jax_moe/dispatch.py",
        "jnp.where(expert_GSK < config.num_networks, position_GSK, 0)",
        "position_GSK",
        rows=("identity experts, capacity, padding",),
    ),
    Mutation(
        "torch: experts that return their input have a queue",
        "torch_ref/dispatch.py",
        "same_GSK = routing.expert_GSK >= config.num_networks",
        "same_GSK = routing.expert_GSK >= config.num_experts",
        rows=("identity experts, capacity, padding",),
    ),
    Mutation(
        "jax: the returned input has no weight",
        "jax_moe/dispatch.py",
        "weight_GS1 * x_GSD.astype(compute)",
        "x_GSD.astype(compute)",
        rows=("identity experts",),
    ),
    Mutation(
        "jax: squared ReLU is not squared",
        "jax_moe/activations.py",
        "jnp.square(jax.nn.relu(x))",
        "jax.nn.relu(x)",
        rows=("squared ReLU",),
    ),
    Mutation(
        "jax: the choice compares scores where logits are asked for",
        "jax_moe/routing.py",
        'compared_GSE = logits_GSE if config.router.selection == "logit" else None',
        "compared_GSE = None",
        tests=("parity_tests/layers/test_pencil.py::test_story",),
    ),
    Mutation(
        "torch: the choice compares scores where logits are asked for",
        "torch_ref/routing.py",
        'compared_GSE = logits_GSE if config.router.selection == "logit" else None',
        "compared_GSE = None",
        tests=("parity_tests/layers/test_pencil_torch.py::test_story",),
    ),
    Mutation(
        "jax: the least sum of weights is left out",
        "jax_moe/routing.py",
        'if config.renormalise == "floor":',
        "if False:",
        rows=("least sum of weights",),
    ),
    Mutation(
        "jax: gate and up exchanged",
        "jax_moe/experts.py",
        "gate_ECF = activate(config.activation, gate_ECF)",
        "gate_ECF, up_ECF = activate(config.activation, up_ECF), gate_ECF",
        rows=("mixtral, einsum",),
    ),
    Mutation(
        "jax: up's offset is left out", "jax_moe/experts.py", "(up_ECF + config.up_offset)", "up_ECF", rows=("gpt_oss",)
    ),
    Mutation(
        "jax: experts have no biases",
        "jax_moe/experts.py",
        "[:, None, :] if config.bias else y",
        "[:, None, :] * 0 if config.bias else y",
        rows=("makemoe",),
    ),
    Mutation(
        "jax: the shared expert is left out",
        "jax_moe/moe.py",
        "y_GSD += shared_GSD",
        "pass",
        rows=("qwen2_moe",),
    ),
    Mutation(
        "jax: the shared gate is a tanh", "jax_moe/moe.py", "y_GSD *= jax.nn.sigmoid(", "y_GSD *= jnp.tanh(",
        rows=("qwen2_moe",),
    ),
    Mutation(
        "jax: experts see the clean input",
        "jax_moe/moe.py",
        'if router.jitter_scope == "block":',
        'if router.jitter_scope == "router":',
        rows=("mixtral, jitter",),
    ),
    Mutation(
        "jax: noise is subtracted",
        "jax_moe/moe.py",
        "return logits_BTE + noise_BTE",
        "return logits_BTE - noise_BTE",
        rows=("noisy top-k",),
    ),
    Mutation(
        "jax: dropout is not divided by what it keeps", "jax_moe/dropout.py", "/ (1 - rate)", "/ 1", rows=("makemoe",)
    ),
    Mutation(
        "jax: attention sees the next token",
        "jax_moe/attention/multihead.py",
        "k_BUHA.shape[1]), bool))",
        "k_BUHA.shape[1]), bool), 1)",
        rows=("attention, no dropout",),
    ),
    Mutation(
        "jax: slots are normalised over slots",
        "jax_moe/soft_moe.py",
        "return jax.nn.softmax(logits_BTEC, axis=1)",
        "return jax.nn.softmax(logits_BTEC, axis=2)",
        rows=("soft moe, residual",),
    ),
    Mutation(
        "jax: phi keeps its length under a scale",
        "jax_moe/soft_moe.py",
        "scale.astype(compute) * unit(phi_DEC, axis=0)",
        "scale.astype(compute) * phi_DEC",
        rows=("soft moe, normalised",),
    ),
    Mutation(
        "jax: padding counts in the load of Soft MoE",
        "jax_moe/soft_moe.py",
        "masked_mean(router_probs(logits_BTE), mask_BT)",
        "masked_mean(router_probs(logits_BTE), None)",
        rows=("soft moe, padding",),
    ),
    Mutation(
        "jax: layer norm's epsilon is flax's",
        "jax_moe/norms.py",
        "LAYER_NORM_EPS = 1e-5",
        "LAYER_NORM_EPS = 1e-6",
        rows=("soft moe, residual",),
    ),
    Mutation(
        "jax: the second residual is left out",
        "jax_moe/models/block.py",
        "y_BTD = x_BTD + output.y_BTD",
        "y_BTD = output.y_BTD",
        rows=("block, makemoe",),
    ),
]

BIAS_MOVES = ("parity_tests/layers/test_pencil.py::test_the_correction_bias_moves_towards_the_mean_load",)
JAX_LOSSES = [
    Mutation(
        "jax: f sums to k where it should to 1",
        "jax_moe/losses.py",
        'load_E * top_k if config.f_sums_to == "k"',
        'load_E * top_k if config.f_sums_to != "k"',
        rows=("makemoe",),
    ),
    Mutation(
        "jax: the balance loss is of the choices, never of the logits",
        "jax_moe/losses.py",
        'if config.balance.of == "choices":',
        "if config.balance.of:",
        rows=("balance loss of the logits",),
    ),
    Mutation(
        "torch: the balance loss is of the choices, never of the logits",
        "torch_ref/losses.py",
        'if config.balance.of == "choices":',
        "if config.balance.of:",
        rows=("balance loss of the logits",),
    ),
    Mutation(
        "jax: the sequence-wise loss counts the biased choices",
        "jax_moe/losses.py",
        'if config.balance.of == "choices":\n        return',
        'if config.balance.of != "logits":\n        return',
        rows=("deepseek_v3, balance loss of each sequence",),
    ),
    Mutation(
        "jax: the sequence-wise loss is that of the whole batch",
        "jax_moe/losses.py",
        "group_balance_loss(by_sequence, config, mask_BT)",
        "group_balance_loss(routing, config, mask_GS)",
        tests=("parity_tests/layers/test_pencil.py::test_balance_loss_of_each_sequence",),
    ),
    Mutation(
        "jax: choices at padding count as load",
        "jax_moe/losses.py",
        "(chosen_GSE if mask_GS is None else chosen_GSE * mask_GS[..., None])",
        "chosen_GSE",
        tests=("parity_tests/layers/test_pencil.py::test_choices_are_counted_without_padding",),
    ),
    Mutation(
        "jax: the correction bias moves towards the loaded",
        "jax_moe/routing.py",
        "jnp.sign(mean - tokens_E)",
        "jnp.sign(tokens_E - mean)",
        tests=BIAS_MOVES,
    ),
    Mutation(
        "jax: the correction bias compares with the rounded mean",
        "jax_moe/routing.py",
        "jnp.where(tokens_E == mean, rest > 0, jnp.sign(mean - tokens_E))",
        "jnp.sign(mean - tokens_E)",
        tests=BIAS_MOVES,
    ),
    Mutation(
        "train.py: the correction bias moves by the load of the first sequence",
        "train/learners/jax_learner.py",
        "tokens_per_expert(expert_BTK, num_experts)",
        "tokens_per_expert(expert_BTK[:1], num_experts)",
        tests=("parity_tests/train/test_correction_bias_torch.py::test_resumed_split_over_devices_and_worked_by_hand",),
    ),
    Mutation(
        "torch: the correction bias is never recentred",
        "torch_ref/routing.py",
        "sign_E = sign_E - sign_E.mean(dim=-1, keepdim=True)",
        "pass",
        tests=("parity_tests/layers/test_pencil_torch.py::test_the_correction_bias_moves_towards_the_mean_load",),
    ),
    Mutation(
        "jax: the balance loss lacks E",
        "jax_moe/losses.py",
        "return num_experts * (f_E * prob_E).sum(axis=-1)",
        "return (f_E * prob_E).sum(axis=-1)",
        rows=("mixtral",),
    ),
    Mutation(
        "jax: targets at padding count",
        "jax_moe/losses.py",
        "axis=-1) - chosen_BT, mask_BT)",
        "axis=-1) - chosen_BT, None)",
        tests=("parity_tests/layers/test_pencil.py::test_next_token_loss",),
    ),
    Mutation(
        "jax: the z-loss is not squared",
        "jax_moe/losses.py",
        "jax.nn.logsumexp(logits_GSE, axis=-1) ** 2",
        "jax.nn.logsumexp(logits_GSE, axis=-1)",
        rows=("mixtral",),
    ),
    Mutation(
        "jax: entropy has the wrong sign",
        "jax_moe/losses.py",
        "masked_mean(-(jnp.exp(log_GSE) * log_GSE)",
        "masked_mean((jnp.exp(log_GSE) * log_GSE)",
        rows=("mixtral",),
    ),
    Mutation(
        "jax: padding counts in means",
        "jax_moe/losses.py",
        "(x_GS * keep).sum(axis=(0, 1)) / safe_denominator(keep.sum())",
        "x_GS.mean(axis=(0, 1))",
        rows=("padding",),
    ),
    Mutation(
        "jax: P is a softmax of logits whatever the score",
        "jax_moe/losses.py",
        "return jax.nn.softmax(log_scores(logits_GSE, config), axis=-1)",
        "return jax.nn.softmax(logits_GSE, axis=-1)",
        rows=("deepseek_v3",),
    ),
    Mutation(
        "jax: the entropy is of softmax(logits) whatever the score",
        "jax_moe/losses.py",
        "jax.nn.log_softmax(log_scores(logits_GSE, config), axis=-1)",
        "jax.nn.log_softmax(logits_GSE, axis=-1)",
        rows=("sqrt-softplus scores",),
    ),
    Mutation(
        "jax: scores of 0 are told apart by the balance loss",
        "jax_moe/routing.py",
        "return jnp.maximum(jax.nn.log_sigmoid(logits_GSE), math.log(tiny))",
        "return jax.nn.log_sigmoid(logits_GSE)",
        tests=("parity_tests/layers/test_scores_of_losses.py::test_scores_of_nought_balance",),
    ),
    Mutation("jax: the sample's variance", "jax_moe/losses.py", "x_E.var() /", "x_E.var(ddof=1) /", rows=("mixtral",)),
    Mutation(
        "jax: smooth load's bar is one rank off",
        "jax_moe/losses.py",
        "best[..., top_k - 1, None])",
        "best[..., top_k, None])",
        tests=("parity_tests/layers/test_pencil.py::test_smooth_load",),
    ),
    Mutation(
        "jax: pooled losses are the layers' mean",
        "jax_moe/losses.py",
        'if config.balance.pooled == "per_layer":',
        "if True:",
        tests=("parity_tests/layers/test_pencil.py::test_balance_loss_per_layer_or_pooled",),
    ),
]

JAX_DECODER = [
    Mutation(
        "jax: the rotation turns the other way",
        "jax_moe/attention/rope.py",
        "jnp.concatenate([-second, first], axis=-1)",
        "jnp.concatenate([second, -first], axis=-1)",
        family="mixtral",
    ),
    Mutation(
        "jax: rotary frequencies by A, not A/2 pairs",
        "jax_moe/attention/rope.py",
        "np.arange(0, head_dim, 2, dtype=np.float64) / head_dim",
        "np.arange(0, head_dim, 2, dtype=np.float64) / (head_dim - 2)",
        family="mixtral",
    ),
    Mutation(
        "jax: rotary frequencies by the head's width, not that of the part which turns",
        "jax_moe/attention/rope.py",
        "frequencies, head_dim = FREQUENCIES[config.kind], config.width(head_dim)",
        "frequencies = FREQUENCIES[config.kind]",
        family="glm4_moe",
        tests=("parity_tests/layers/test_decoder.py::test_a_part_of_each_head_turns",),
    ),
    Mutation(
        "jax: halves are paired where neighbours are",
        "jax_moe/attention/rope.py",
        'if pairs == "neighbours":',
        "if False:",
        family="ernie4_5_moe",
        tests=("parity_tests/layers/test_decoder.py::test_neighbours_turn_together",),
    ),
    Mutation(
        "jax: queries and keys are normed before and after they are turned",
        "jax_moe/attention/grouped.py",
        'if config.qk_norm_place == "before_rope":',
        "if True:",
        family="hunyuan_v1_moe",
    ),
    Mutation(
        "jax: every layer turns queries and keys",
        "jax_moe/porting/families/decoders.py",
        "replace(attention, rope=None)",
        "attention",
        family="exaone_moe",
    ),
    Mutation(
        "jax: the window is one longer",
        "jax_moe/attention/masks.py",
        "(back_TU < window)",
        "(back_TU <= window)",
        family="mixtral_window",
    ),
    Mutation(
        "jax: RMSNorm's epsilon is outside the root",
        "jax_moe/norms.py",
        ".mean(axis=-1, keepdims=True) + eps)",
        ".mean(axis=-1, keepdims=True)) + eps",
        family="mixtral",
    ),
    Mutation(
        "jax: attention sinks take no share",
        "jax_moe/attention/grouped.py",
        "if not self.config.sinks:",
        "if True:",
        family="gpt_oss",
        tests=("parity_tests/layers/test_sinks.py::test_a_sink_takes_its_share",),
    ),
    Mutation(
        "jax: gpt-oss's norm is rounded before its scale",
        "jax_moe/norms.py",
        "if wide_scale:",
        "if False:",
        tests=("parity_tests/layers/test_sinks.py::test_the_norm_is_rounded_after_its_scale",),
    ),
    Mutation(
        "jax: absorbed steps look at the compressed vector alone, not at the turned key",
        "jax_moe/attention/latent.py",
        'q_BTHO = jnp.concatenate([jnp.einsum("BTHX,ZHX->BTHZ", q_BTHX, up_ZHX), q_BTHP], axis=-1)',
        'q_BTHO = jnp.concatenate([jnp.einsum("BTHX,ZHX->BTHZ", q_BTHX, up_ZHX), 0 * q_BTHP], axis=-1)',
        tests=("parity_tests/layers/test_latent.py::test_absorbed_steps_are_those_of_one_call",),
    ),
    Mutation(
        "jax: scores are scaled by YaRN's mscale once, not by its square",
        "jax_moe/config/latent.py",
        "return scale * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2",
        "return scale * yarn_mscale(rope.factor, rope.mscale_all_dim)",
        family="deepseek_v3",
        tests=("parity_tests/layers/test_latent.py::test_by_hand",),
    ),
    Mutation(
        "jax: the compressed keys are not normed",
        "jax_moe/attention/latent.py",
        "return jnp.concatenate([self.latent_norm(latent_BTZ), key_BTP], axis=-1)",
        "return jnp.concatenate([latent_BTZ, key_BTP], axis=-1)",
        family="deepseek_v2",
    ),
    Mutation(
        "jax: queries grow with every position",
        "jax_moe/attention/latent.py",
        "jnp.floor(positions.position_BT.astype(wide(dtype)) / rope.original_max_positions)",
        "(positions.position_BT.astype(wide(dtype)) / rope.original_max_positions)",
        family="mistral4",
        tests=("parity_tests/layers/test_latent.py::test_queries_grow_with_their_position",),
    ),
    Mutation(
        "layers that predict further tokens are dropped on saving",
        "jax_moe/porting/pretrained.py",
        "({} if loaded is None else carried_by(loaded))",
        "{}",
        tests=("parity_tests/porting/test_carried.py::test_every_way_keeps_them",),
    ),
    Mutation(
        "jax: Granite's residual multiplier is left out",
        "jax_moe/models/decoder.py",
        "x_BTD + (y_BTD if multiplier == 1 else y_BTD * multiplier)",
        "x_BTD + y_BTD",
        family="granitemoe",
    ),
    Mutation(
        "jax: logits are multiplied, not divided",
        "jax_moe/models/decoder.py",
        "logits_BTV / divisor",
        "logits_BTV * divisor",
        family="granitemoe",
    ),
]

TORCH = [
    Mutation(
        "torch: ties to the higher index",
        "torch_ref/top_k.py",
        "torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count]",
        "(score.shape[-1] - 1 - torch.sort(score.flip(-1), dim=-1, descending=True, stable=True).indices)[..., :count]",
        rows=("equal logits",),
    ),
    Mutation(
        "torch: softplus with torch's threshold",
        "torch_ref/routing.py",
        "F.softplus(x, threshold=40)",
        "F.softplus(x, threshold=1)",
        rows=("noisy top-k",),
    ),
    Mutation(
        "torch: eps in every sum",
        "torch_ref/routing.py",
        "safe_denominator(weight_GSK.sum(dim=-1, keepdim=True))\n    if",
        "safe_denominator(weight_GSK.sum(dim=-1, keepdim=True) + 1e-6)\n    if",
        rows=("mixtral",),
    ),
    Mutation(
        "torch: clusters are filled with 0",
        "torch_ref/routing.py",
        'fill = -torch.inf if config.cluster_fill == "neg_inf" else 0.0',
        "fill = 0.0",
        rows=("deepseek_v3", "bf16-rounded logits, clusters"),
        tests=("parity_tests/layers/test_pencil_torch.py::test_story",),
    ),
    Mutation(
        "torch: scores in the input's dtype",
        "torch_ref/dims.py",
        "return torch.promote_types(dtype, torch.float32)",
        "return dtype",
        tests=("parity_tests/precision/test_precision.py",),
    ),
    Mutation(
        "torch: the chosen weights have no gradient",
        "torch_ref/routing.py",
        "weight_GSK = score_GSE.gather(-1, expert_GSK)",
        "weight_GSK = score_GSE.detach().gather(-1, expert_GSK)",
        rows=("mixtral",),
    ),
    Mutation(
        "torch: queues start with the last token",
        "torch_ref/dispatch.py",
        "queue_R = wants_SK.flatten().nonzero().squeeze(1)",
        "queue_R = wants_SK.flatten().nonzero().squeeze(1).flip(0)",
        rows=("overflow, token order",),
    ),
    Mutation(
        "torch: lowest probability first",
        "torch_ref/dispatch.py",
        "[queue_R], descending=True",
        "[queue_R], descending=False",
        rows=("overflow, probability order",),
    ),
    Mutation(
        "torch: second choices first",
        "torch_ref/dispatch.py",
        "k_R, row_R = wants_SK[order_S].T.nonzero(as_tuple=True)",
        "k_R, row_R = wants_SK[order_S].T.flip(0).nonzero(as_tuple=True); k_R = wants_SK.shape[1] - 1 - k_R",
        rows=OVERFLOW,
    ),
    Mutation(
        "torch: batch priority by the last choice's weight",
        "torch_ref/dispatch.py",
        "weight_SK.detach().amax(dim=1)",
        "weight_SK.detach().amin(dim=1)",
        rows=("overflow, batch order",),
    ),
    Mutation(
        "torch: queues are one shorter",
        "torch_ref/dispatch.py",
        "priority, mask_S)[:capacity]",
        "priority, mask_S)[: capacity - 1]",
        rows=OVERFLOW,
    ),
    Mutation(
        "torch: the weight is applied twice",
        "torch_ref/dispatch.py",
        'if config.expert.weight_on == "output":',
        "if True:",
        rows=("weight on input",),
    ),
    Mutation(
        "torch: a token keeps its last expert alone",
        "torch_ref/dispatch.py",
        "sum_flat.index_add_(0, token_R, y_RD.to(sum_flat.dtype))",
        "sum_flat[token_R] = y_RD.to(sum_flat.dtype)",
        rows=("mixtral",),
    ),
    Mutation(
        "torch: padding feeds the shared expert's answer",
        "torch_ref/moe.py",
        "shared_GSD = shared_GSD.masked_fill(~mask_GS[..., None], 0)",
        "pass",
        tests=("parity_tests/layers/test_poisoned_torch.py::test_shared_experts_with_biases_say_nothing_at_padding",),
    ),
    Mutation(
        "torch: the clamp is symmetric for the gate",
        "torch_ref/experts.py",
        "gate_RF.clamp(max=before)",
        "gate_RF.clamp(min=-config.clamp, max=config.clamp)",
        tests=("parity_tests/layers/test_pencil_torch.py" + CLAMP,),
    ),
    Mutation(
        "torch: silu becomes gelu", "torch_ref/activations.py", "return F.silu(x)", "return F.gelu(x)",
        rows=("mixtral",),
    ),
    Mutation(
        "torch: the load is not divided",
        "torch_ref/losses.py",
        ".to(wide(dtype)) / max(named.shape[0], 1)",
        ".to(wide(dtype))",
        rows=("mixtral",),
    ),
    Mutation(
        "torch: the sample's variance", "torch_ref/losses.py", "x_E.var(correction=0)", "x_E.var(correction=1)",
        rows=("mixtral",),
    ),
    Mutation(
        "torch: P is a softmax of logits whatever the score",
        "torch_ref/losses.py",
        "return log_scores(_widened(logits_GSE), config).softmax(dim=-1)",
        "return _widened(logits_GSE).softmax(dim=-1)",
        rows=("deepseek_v3",),
    ),
    Mutation(
        "torch: importance counts padding",
        "torch_ref/losses.py",
        "given = _widened(real_tokens(weight_GSK, mask_GS)).flatten()",
        "given = _widened(real_tokens(weight_GSK, mask_GS)).flatten() * 0 + 1",
        rows=("padding",),
    ),
    Mutation(
        "torch: values and keys exchanged",
        "torch_ref/attention/multihead.py",
        "linear(x_BTD, head.key), linear(x_BTD, head.value)",
        "linear(x_BTD, head.value), linear(x_BTD, head.key)",
        rows=("attention, no dropout",),
    ),
    Mutation(
        "torch: padding is seen",
        "torch_ref/attention/multihead.py",
        "scores_BTU = scores_BTU.masked_fill(~mask_BU[:, None, :], lowest)",
        "pass",
        rows=("attention, both ways, padding",),
    ),
]

# These are being written: last, and few.
DISPATCH = [
    Mutation(
        "jax: a queue holds one more",
        "jax_moe/dispatch.py",
        "kept_GSK = position_GSK < (",
        "kept_GSK = position_GSK <= (",
        rows=("overflow, choice order, renormalised",),
    ),
    Mutation(
        "jax: dropped weight is not given on",
        "jax_moe/dispatch.py",
        "weight_GSK = weight_GSK / safe_denominator(total_GS1) * config.router.scale",
        "pass",
        rows=("overflow, token order, renormalised",),
    ),
    Mutation(
        "jax: padding takes slots",
        "jax_moe/dispatch.py",
        "kept_GSK &= mask_GS[..., None]",
        "pass",
        rows=("padding, fixed groups",),
    ),
    Mutation(
        "jax: first choices are not first",
        "jax_moe/dispatch.py",
        "jnp.arange(K, dtype=jnp.int32) * S + token_GS[..., None]",
        "jnp.arange(K, dtype=jnp.int32) + K * token_GS[..., None]",
        rows=OVERFLOW,
    ),
    Mutation(
        "jax: batch priority is choice order",
        "jax_moe/dispatch.py",
        'if priority == "batch":',
        "if False:",
        rows=("overflow, batch order",),
    ),
    Mutation(
        "jax: lowest probability first",
        "jax_moe/dispatch.py",
        "jnp.argsort(-weight_GR",
        "jnp.argsort(weight_GR",
        rows=("overflow, probability order",),
    ),
    Mutation(
        "blocks: an expert's last rows have no block",
        "jax_moe/kernels/blocks.py",
        "jnp.maximum(-(-count_E // block), 1)",
        "jnp.maximum(count_E // block, 1)",
        rows=("everybody chooses one",),
        columns=("every dispatcher",),
    ),
    Mutation(
        "blocks: a token's weight reads the next row",
        "jax_moe/kernels/moves.py",
        "rows_at(g_weight_P, place_SK), *no_gradient",
        "rows_at(g_weight_P, place_SK + 1), *no_gradient",
        rows=("mixtral",),
        columns=("every dispatcher",),
    ),
    Mutation(
        "jax: gather's gradient misses a choice",
        "jax_moe/kernels/moves.py",
        "for place_S in place_SK.T)\n    return sum(rows)",
        "for place_S in place_SK.T[:1])\n    return sum(rows)",
        rows=("makemoe",),
    ),
    Mutation(
        "jax: grouped's weights of choices have no gradient",
        "jax_moe/kernels/grouped.py",
        "g_enter_factor if on_input else g_leave_factor, g_own",
        "g_enter_factor if on_input else g_leave_factor * 0, g_own",
        rows=("mixtral",),
    ),
    Mutation(
        "jax: an expert's later tiles replace its gradient",
        "jax_moe/kernels/grouped.py",
        "expert, add=tile.full)",
        "expert, add=False)",
        tests=("parity_tests/layers/test_tiles.py::test_tiles_of_any_size",),
    ),
]

SKIP = "parity_tests/layers/test_unchosen_skip_torch.py::"
STEPS, STATE = (f"{SKIP}test_steps_are_those_of_pytorch",), (f"{SKIP}test_state_there_and_back",)
OPTIMIZERS = [
    Mutation(
        "jax: an unchosen expert's moments go on",
        "jax_moe/unchosen.py",
        "return jnp.where(mask, decay, 1).astype(dtype), jnp.where(mask, 1 - decay, 0).astype(dtype)",
        "return decay, 1 - decay",
        tests=STEPS,
    ),
    Mutation(
        "jax: an unchosen expert counts a step",
        "jax_moe/unchosen.py",
        "value + masks[path].astype(value.dtype)",
        "value + 1",
        tests=STEPS,
    ),
    Mutation(
        "jax: an unchosen expert decays",
        "jax_moe/unchosen.py",
        "value if mask is None else jnp.where(mask, value, 0)",
        "value",
        tests=STEPS,
    ),
    Mutation(
        "jax: the last part alone says who was chosen",
        "jax_moe/unchosen.py",
        "value | (before[path] & goes_on)",
        "value",
        tests=STEPS,
    ),
    Mutation(
        "jax: what was all dropped counts as chosen",
        "jax_moe/losses.py",
        "(stats.expert_load_E > 0) & (stats.dropped_fraction < 1)[..., None]",
        "stats.expert_load_E > 0",
        tests=(f"{SKIP}test_who_had_tokens",),
    ),
    Mutation(
        "torch: an unchosen expert keeps its zeros",
        "torch_ref/unchosen.py",
        "parameter.grad = None",
        "pass",
        tests=STEPS,
    ),
    Mutation(
        "port: the experts' own counts are lost",
        "jax_moe/porting/optimizer/state.py",
        "own_steps = {name: steps[name] for name in own if steps[name] != most}",
        "own_steps = {}",
        tests=STATE,
    ),
]

MUTATIONS = [*OPTIMIZERS, *CONFIG, *JAX_ROUTING, *JAX_LAYERS, *JAX_LOSSES, *JAX_DECODER, *TORCH, *DISPATCH]
assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS), "names must be unique"
