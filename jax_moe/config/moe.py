"""The contract: every choice on which MoE implementations differ, named once and read by both frameworks.

Standard library only, so that `torch_ref` can import it without jax. Each dataclass is frozen and checked when it is
made: a bad value raises ValueError with the field, the value and what is allowed. Letters (B, T, S, E, K, C ...) are
those of `dims.py`. The file is longer than most so that a whole contract can be read in one place.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

from jax_moe.config.checks import (
    check_above_zero,
    check_flags,
    check_literals,
    check_positive_ints,
    check_rates,
    is_int,
    is_number,
    require,
)

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
Order = Literal["score_then_select", "select_then_softmax", "sparse_mixer"]
Renormalise = Literal["none", "sum", "eps", "floor"]
ClusterScore = Literal["max", "top2_sum"]
ClusterFill = Literal["neg_inf", "zero"]
Noise = Literal["none", "learned_gaussian", "input_jitter"]
Priority = Literal["token", "choice", "probability", "batch"]
Activation = Literal["relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu", "identity"]
# x / rms(x) * w, rounded before the scale or (wide) after it; x / rms(x) * (1 + w); or x (1 + w) over its own rms
MixtureNorm = Literal["none", "rms", "rms_wide", "rms_centered", "rms_of_scaled"]
Dispatcher = Literal["auto", "einsum", "gather", "grouped", "ragged", "blocks", "chosen"]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How logits become choices of experts and their weights."""

    score: Score = "softmax"  # how a logit becomes a score (sigmoid: DeepSeek-V3; sqrt_softplus: DeepSeek-V4)
    # scores of all experts, then the best K of them; top-k of the logits, then a softmax over the K chosen (makeMoE,
    # gpt-oss); or a softmax for each choice, over the logits near the best that earlier choices left (the sparse mixer
    # of Phi-3.5-MoE, arXiv 2409.12136, at evaluation)
    order: Order = "score_then_select"
    mixer_eps: float = 0.01  # "sparse_mixer": near is |best - logit| <= 2 eps max(|logit|, best) (router_jitter_noise)
    selection: Literal["score", "logit"] = "score"  # what the choice compares: scores, or logits (Kolibri, Llama 4)
    renormalise: Renormalise = "none"  # the chosen weights: unchanged, / sum, / (sum + eps), or / max(sum, eps)
    renormalise_eps: float = 1e-20  # for renormalise="eps" (default: DeepSeek-V3's) and "floor" (Ernie: 1e-12)
    logit_scale: float = 1.0  # multiplies the linear map's answer (Muse Spark: 0.18)
    input_norm: bool = False  # the linear map reads x / rms(x) * w / sqrt(D), with a learned w of its own (Gemma 4)
    input_norm_eps: float = 1e-6  # of that norm
    expert_scale: bool = False  # a learned factor of each expert multiplies its weight at the end (Gemma 4)
    scale: float = 1.0  # multiplies the weights after renormalisation (routed_scaling_factor)
    learned_scale: bool = False  # a number that is trained multiplies them too (Inkling)
    shared_experts: int = 0  # shared experts that it weighs too: their scores share in the sum (Inkling)
    bias: bool = False  # a bias in the router's linear map
    correction_bias: bool = False  # [E], added to what is compared, for the choice alone (DeepSeek-V3); not trained
    # above 0: logits of a network of that width in place of a linear map: a map with bias, a norm, two maps with bias
    # and GELU, a map (ZAYA1). What its first map answers is its state, which a call also returns
    network_dim: int = 0
    network_norm_eps: float = 1e-5  # of the norm of that state
    takes_state: bool = False  # to its own state it adds that of the mixture before, times learned factors (ZAYA1)
    # logits of E = n * n experts are sums of two of 2n numbers: expert (i, j) has first half's i plus second half's j
    # (product keys, arXiv 1907.05242, section 3.1). "flat": the halves are not those of a token's own 2n numbers but
    # of all tokens' 2n numbers in a row, so that a token's choice depends on others (Doge, as it was trained)
    product_keys: Literal["none", "own", "flat"] = "none"
    # above 0: a stored table of so many tokens names each token's K experts, and scores only weigh them (DeepSeek-V4's
    # hash_moe; Hash Layers, arXiv 2106.04426); the layer is called with tokens_BT
    table_tokens: int = 0
    num_clusters: int = 1  # cluster-limited top-k: number of equal clusters of experts (n_group)
    top_clusters: int = 1  # number of clusters, the best, that experts may be chosen from (topk_group)
    cluster_score: ClusterScore = "top2_sum"  # a cluster's score: its best expert (V2), or the sum of its best two (V3)
    cluster_fill: ClusterFill = "neg_inf"  # what replaces the scores of the other clusters (V3: -inf, V2: 0)
    dtype: Literal["float32", "input"] = "float32"  # of the linear map: fp32 or wider, or the input's; scores are wide
    weight_dtype: Literal["float32", "input"] = "float32"  # weights stay wide, or are rounded to the input's (Qwen)
    noise: Noise = "none"  # learned softplus noise on the logits (makeMoE), or multiplicative jitter on the input
    noise_at_evaluation: bool = False  # makeMoE: True
    jitter_eps: float = 0.0  # input_jitter draws from U(1 - eps, 1 + eps)
    jitter_scope: Literal["router", "block"] = "router"  # what sees the jitter: the router (Switch) or all (Mixtral)

    def __post_init__(self) -> None:
        check_literals(self)
        check_positive_ints(num_clusters=self.num_clusters, top_clusters=self.top_clusters)
        limit = self.num_clusters
        require(self.top_clusters <= limit, "top_clusters", self.top_clusters, f"at most num_clusters={limit}")
        check_flags(
            self, "bias", "correction_bias", "noise_at_evaluation", "input_norm", "expert_scale", "learned_scale",
            "takes_state",
        )
        check_above_zero(
            renormalise_eps=self.renormalise_eps, scale=self.scale, logit_scale=self.logit_scale,
            input_norm_eps=self.input_norm_eps, network_norm_eps=self.network_norm_eps,
        )
        check_rates(jitter_eps=self.jitter_eps, mixer_eps=self.mixer_eps)
        jitters = self.noise == "input_jitter"
        fits = jitters == (self.jitter_eps > 0)
        require(fits, "jitter_eps", self.jitter_eps, "above 0 exactly when noise='input_jitter'")
        weighed = self.shared_experts
        require(is_int(weighed) and weighed >= 0, "shared_experts", weighed, "an integer of at least 0")
        if weighed:
            words = "'score_then_select' with shared_experts"
            require(self.order == "score_then_select", "order", self.order, words)
            learned = self.noise == "learned_gaussian"
            require(not learned, "noise", self.noise, "'none' or 'input_jitter' with shared_experts")
        if self.selection == "logit":
            require(self.num_clusters == 1, "num_clusters", self.num_clusters, "1 when selection='logit'")
        tokens = self.table_tokens
        require(is_int(tokens) and tokens >= 0, "table_tokens", tokens, "an integer of at least 0")
        if tokens:
            plain = self.order == "score_then_select" and self.selection == "score" and self.num_clusters == 1
            require(plain and not self.correction_bias, "table_tokens", tokens, "0 where the router chooses by a rule")
        self._check_maps()
        if self.order != "score_then_select":
            when = f"when order={self.order!r}"
            require(self.score == "softmax", "score", self.score, f"'softmax' {when}")
            require(not self.correction_bias, "correction_bias", True, f"False {when}")
            require(self.num_clusters == 1, "num_clusters", self.num_clusters, f"1 {when}")

    def _check_maps(self) -> None:
        """What stands in the place of one linear map has no parts of such a map."""
        width = self.network_dim
        require(is_int(width) and width >= 0, "network_dim", width, "an integer of at least 0")
        state = width > 0 or not self.takes_state
        require(state, "takes_state", True, "False without a network (network_dim=0)")
        keys = self.product_keys != "none"
        require(not (keys and width), "product_keys", self.product_keys, "'none' with a network_dim")
        words = "a network_dim" if width else "product_keys"
        for name, plain in (("bias", False), ("input_norm", False), ("shared_experts", 0), ("table_tokens", 0)):
            value = getattr(self, name)
            require(value == plain or not (keys or width), name, value, f"{plain!r} with {words}")
        linear = self.noise != "learned_gaussian" or not (keys or width)
        require(linear, "noise", self.noise, f"'none' or 'input_jitter' with {words}")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """The number of tokens that an expert takes from a group, and which choices are dropped when there are more.

    The capacity is computed once, in exact rational arithmetic, with the factor read as the decimal that was written: C
    = clamp(max(minimum, round_up_to(multiple, rounding(S * K / E * factor)))), or clamp(slots). An original that
    computes it in floats can differ by one: makeMoE's int(100 * 0.29) is 28, while floor(100 * 29/100) is 29 here.

    `priority` orders the choices of a group, and so every expert's queue; ties go to the lower token index:
    "token": token by token, each with its first choice before its second (makeMoE, Switch);
    "choice": all first choices in token order, then all second choices (GShard; V-MoE's "vanilla" routing);
    "probability": choices by weight, the highest first;
    "batch": V-MoE's Batch Prioritized Routing (arXiv 2106.05974, algorithm 2): tokens by their best weight, all first
    choices in that order, then all second choices. Weights are those before drops, renormalised if the router does so.
    """

    factor: float | str | Fraction = 1.0  # times the fair share S K / E; read as the decimal that is written
    rounding: Literal["floor", "ceil"] = "floor"  # of that product, down (makeMoE) or up (Switch, V-MoE)
    multiple: int = 1  # round up to a multiple of this (V-MoE: 4)
    minimum: int = 0  # minimum number of slots (flaxformer: 4)
    clamp: bool = True  # at most S slots: a token goes to an expert only once
    slots: int | None = None  # a constant C in place of the formula (Hugging Face's Switch: expert_capacity)
    counts_top_k: bool = True  # K is in the formula (V-MoE, makeMoE) or is not (Switch, GShard, flaxformer)
    group: Literal["batch", "sequence", "fixed"] = "batch"  # which tokens compete: all, a sequence's, or group_size
    group_size: int | None = None  # for group="fixed"; a short last group has the capacity of a full group
    priority: Priority = "token"  # the order of an expert's queue, see above
    renormalise_after_drop: bool = False  # a token's kept choices take over the weight of its dropped choices (GShard)
    below_one: Literal["error", "drop_all"] = "error"  # if C = 0: raise, or drop every token (makeMoE on short prompts)

    def __post_init__(self) -> None:
        check_literals(self)
        try:
            exact = self.exact_factor
        except (ValueError, ZeroDivisionError, OverflowError, TypeError):
            raise ValueError(f"factor={self.factor!r}: must be a number above 0") from None
        require(exact > 0, "factor", self.factor, "a number above 0")
        check_flags(self, "clamp", "counts_top_k", "renormalise_after_drop")
        check_positive_ints(multiple=self.multiple)
        require(is_int(self.minimum) and self.minimum >= 0, "minimum", self.minimum, "an integer of at least 0")
        if self.slots is not None:
            check_positive_ints(slots=self.slots)
        fixed = self.group == "fixed"
        require(fixed == (self.group_size is not None), "group_size", self.group_size, "set exactly when group='fixed'")
        if fixed:
            check_positive_ints(group_size=self.group_size)

    @property
    def exact_factor(self) -> Fraction:
        """The factor as the decimal that was written: 0.29 is 29/100 and not the nearest double."""
        if isinstance(self.factor, Fraction):
            return self.factor
        text = str(self.factor)
        _, _, exponent = text.lower().partition("e")
        if len(text) > 400 or len(exponent.lstrip("+-")) > 3:  # as a fraction 1e999999999 would fill the memory
            raise ValueError("a factor of too many digits")
        return Fraction(text)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """The feed-forward network of every expert: act(x up + b) down + b, or (act(x gate) * (x up)) down."""

    activation: Activation = "silu"  # the function act of the forms above
    gated: bool = True  # with a gate, as SwiGLU; else the first form above
    bias: bool = False  # the biases of every map of an expert
    clamp: float | None = None  # bound of gate (above) and of up (above and below) (gpt-oss: 7)
    clamp_on: Literal["gate", "activation"] = "gate"  # of gate, or of its activation (Step)
    gate_softcap: float | None = None  # c tanh(gate / c) * sigmoid(gate), for silu's gate * sigmoid(gate) (Inkling 2)
    up_softcap: float | None = None  # c tanh(up / c) in place of up (Inkling 2)
    up_offset: float = 0.0  # added to up before the product (gpt-oss: 1)
    weight_on: Literal["output", "input"] = "output"  # what the routing weight multiplies (input: Llama 4)
    dropout: float = 0.0  # on an expert's answer (makeMoE)
    answer_norm: MixtureNorm = "none"  # of a routed expert's answer, before weight and dropout; all share its scale
    answer_norm_eps: float = 1e-8  # of that norm (default: Muse Spark's)
    # Width of the shared expert, which every token goes to, or of each that the router weighs; 0: none
    shared_dim: int = 0
    shared_gate: bool = False  # multiplies its answer by sigmoid(x . gate) (Qwen2-MoE)
    shared_clamp: float | Literal["same"] | None = "same"  # its own bound (HY-V4: None)
    shared_gated: bool | Literal["same"] = "same"  # whether it is gated (Doge: True beside experts that are not)
    shared_scale: float = 1.0  # multiplies its answer (Cohere: 1/2)

    def __post_init__(self) -> None:
        check_literals(self)
        check_rates(dropout=self.dropout)
        check_flags(self, "gated", "bias", "shared_gate")
        for name, value in (("clamp", self.clamp), ("shared_clamp", self.shared_clamp)):
            same = name == "shared_clamp" and value == "same"
            bound = value is None or same or (is_number(value) and value > 0)
            require(bound, name, value, f"{'' if name == 'clamp' else repr('same') + ', '}None or a number above 0")
        check_above_zero(shared_scale=self.shared_scale, answer_norm_eps=self.answer_norm_eps)
        require(is_number(self.up_offset), "up_offset", self.up_offset, "a number")
        require(self.clamp is None or self.gated, "clamp", self.clamp, "None unless gated")
        for name, value in (("gate_softcap", self.gate_softcap), ("up_softcap", self.up_softcap)):
            require(value is None or (is_number(value) and value > 0), name, value, "None or a number above 0")
            require(value is None or self.gated, name, value, "None unless gated")
            require(value is None or self.clamp is None, name, value, "None with a clamp")
        silu = self.gate_softcap is None or self.activation == "silu"
        require(silu, "activation", self.activation, "'silu' with a gate_softcap")
        require(self.up_offset == 0 or self.gated, "up_offset", self.up_offset, "0 unless gated")
        width = self.shared_dim
        require(is_int(width) and width >= 0, "shared_dim", width, "an integer of at least 0")
        gated = not self.shared_gate or width > 0
        require(gated, "shared_gate", True, "False without a shared expert (shared_dim=0)")
        plain = width > 0 or (self.shared_clamp == "same" and self.shared_scale == 1)
        require(plain, "shared_dim", width, "above 0 for a shared expert's own clamp or scale")
        require(self.shared_gated in (True, False, "same"), "shared_gated", self.shared_gated, "'same', True or False")
        other = width > 0 or self.shared_gated == "same"
        require(other, "shared_gated", self.shared_gated, "'same' without a shared expert (shared_dim=0)")
        gated = self.gated or self.shared_clamp in ("same", None)
        require(gated, "shared_clamp", self.shared_clamp, "'same' or None unless gated")

    @property
    def shared(self) -> "ExpertConfig":
        """The contract of the shared expert by itself."""
        clamp = self.clamp if self.shared_clamp == "same" else self.shared_clamp
        gated = self.gated if self.shared_gated == "same" else self.shared_gated
        own: dict[str, Any] = {"shared_dim": 0, "shared_gate": False, "shared_clamp": "same", "shared_scale": 1.0}
        own |= {"answer_norm": "none", "shared_gated": "same"}
        return dataclasses.replace(self, clamp=clamp, gated=gated, dropout=0.0, **own)


@dataclass(frozen=True, kw_only=True)
class AroundConfig:
    """What stands around the experts: maps into their width and out of it, and norms.

    With a `latent_dim` routed experts work in that width: they read norm(x W_in), and the sum of their weighted answers
    is mapped back by W_out. Router and shared experts see x as it is.
    Four norms belong to the parts: of what routed experts read, of the sum of their weighted answers, of what the
    shared expert reads and of its answer. Where Gemma 4 has a dense network beside its mixture, that is the shared
    expert with norms of its own.
    """

    latent_dim: int = 0  # above 0: maps to this width and back around the experts (Nemotron-H, Muse Spark)
    latent_norm: MixtureNorm = "none"  # of what the maps hand the experts (Muse Spark)
    latent_norm_eps: float = 1e-6  # of that norm
    output_norm: MixtureNorm = "none"  # of the whole answer, shared expert included (A.X K1)
    output_norm_eps: float = 1e-6  # of that norm
    input_norm: MixtureNorm = "none"  # of what routed experts read; the router's is its own (Gemma 4)
    routed_norm: MixtureNorm = "none"  # of the routed experts' weighted sum (Gemma 4)
    shared_input_norm: MixtureNorm = "none"  # of what the shared expert reads (Gemma 4)
    shared_norm: MixtureNorm = "none"  # of the shared expert's answer, behind its gate (Gemma 4)
    norm_eps: float = 1e-6  # of the four norms above

    def __post_init__(self) -> None:
        check_literals(self)
        dim = self.latent_dim
        require(is_int(dim) and dim >= 0, "latent_dim", dim, "an integer of at least 0")
        check_above_zero(
            latent_norm_eps=self.latent_norm_eps, output_norm_eps=self.output_norm_eps, norm_eps=self.norm_eps
        )
        mapped = self.latent_norm == "none" or self.latent_dim > 0
        require(mapped, "latent_norm", self.latent_norm, "'none' without a latent_dim")


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """The load-balancing loss E * sum_e f_e P_e (Switch Transformers, eq. 4-6; Mixtral in Hugging Face).

    f counts the choices as made, with the correction bias. P is the mean over tokens of the scores over their sum:
    softmax(logits), also if experts are selected by their logits (Hugging Face), and s / sum(s) for sigmoid
    (DeepSeek-V3, arXiv 2412.19437, eq. 19; Megatron-LM) and sqrt_softplus. Scores too small to be distinguished from 0
    count as equal, as for the choice: if all scores are that small, P is 1/E and the loss 1 (or K).
    DeepSeek-V3's sequence-wise loss (eq. 17 to 20) is of="scores", counted_in="sequence".
    """

    f_sums_to: Literal["one", "k"] = "one"  # f as a share of choices (balanced loss: 1), or of tokens (K; Hugging Face)
    pooled: Literal["per_layer", "over_layers"] = "per_layer"  # mean of losses, or loss of mean f and P (HF)
    # f of the choices and P of the scores; or f of the K largest scores, whatever bias or clusters decide the choice
    # (DeepSeek-V3, eq. 18); or that of the logits, with P of softmax(logits) (MiniMax-M2, Ernie 4.5 in transformers)
    of: Literal["choices", "scores", "logits"] = "choices"
    # f and P over all tokens, or the mean of the losses of the groups (`CapacityConfig.group`) or of the sequences
    counted_in: Literal["batch", "group", "sequence"] = "batch"

    def __post_init__(self) -> None:
        check_literals(self)
        apart = self.counted_in == "batch" or self.pooled == "per_layer"
        require(apart, "counted_in", self.counted_in, "'batch' when pooled='over_layers'")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A sparse MoE layer. `jax_moe.presets` make contracts, `with_capacity` and `dataclasses.replace` change them."""

    kind: ClassVar[str] = "moe"

    model_dim: int
    expert_dim: int
    num_experts: int
    top_k: int
    # Of num_experts, the last so many return their input (LongCat's zero-computation experts): choices as any other, in
    # capacity's E and in the load, but without weights, queue or drops
    identity_experts: int = 0
    identity_answer: Literal["input", "nothing"] = "input"  # what these return; nothing: ZAYA1's skip expert
    router: RouterConfig = field(default_factory=RouterConfig)
    capacity: CapacityConfig | None = None  # None: dropless
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    answer_bias: bool = False  # [D], added to the sum of a token's experts, whatever was dropped (JetMoE)
    around: AroundConfig = field(default_factory=AroundConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    dispatcher: Dispatcher = "auto"  # how JAX moves tokens; the answer is the same

    def __post_init__(self) -> None:
        check_literals(self)
        check_flags(self, "answer_bias")
        E, K = self.num_experts, self.top_k
        check_positive_ints(model_dim=self.model_dim, expert_dim=self.expert_dim, num_experts=E, top_k=K)
        require(K <= E, "top_k", K, f"at most num_experts={E}")
        self._check_identity()
        self._check_keys()
        shared = self.expert.shared_dim > 0
        for name in ("shared_input_norm", "shared_norm"):
            norm = getattr(self.around, name)
            require(shared or norm == "none", name, norm, "'none' without a shared expert (shared_dim=0)")
        after_drop = self.capacity is not None and self.capacity.renormalise_after_drop
        scaled = self.router.expert_scale and after_drop
        require(not scaled, "expert_scale", True, "False when renormalise_after_drop=True")
        self._check_shared()
        clusters, top = self.router.num_clusters, self.router.top_clusters
        require(E % clusters == 0, "num_clusters", clusters, f"a divisor of num_experts={E}")
        width = E // clusters
        require(top * width >= K, "top_k", K, f"at most {top * width}, the experts in top_clusters={top}")
        two = clusters == 1 or self.router.cluster_score != "top2_sum" or width >= 2
        require(two, "cluster_score", self.router.cluster_score, "'max' when a cluster holds one expert")
        when, others = ("with", ["gather"]) if self.capacity else ("without", ["grouped", "ragged", "blocks", "chosen"])
        allowed = ["auto", "einsum", *others]
        words = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r} {when} a capacity"
        require(self.dispatcher in allowed, "dispatcher", self.dispatcher, words)

    def _check_identity(self) -> None:
        same, K = self.identity_experts, self.top_k
        require(is_int(same) and same >= 0, "identity_experts", same, "an integer of at least 0")
        most = self.num_experts - K
        require(same <= most, "identity_experts", same, f"at most {most}: top_k={K} experts have weights")
        plain = self.expert.dropout == 0
        require(same == 0 or plain, "dropout", self.expert.dropout, "0 with identity_experts")
        require(self.around.latent_dim == 0 or plain, "dropout", self.expert.dropout, "0 with a latent_dim")
        answer = same > 0 or self.identity_answer == "input"
        require(answer, "identity_answer", self.identity_answer, "'input' without identity_experts")

    def _check_keys(self) -> None:
        keys, E = self.router.product_keys, self.num_experts
        square = keys == "none" or math.isqrt(E) ** 2 == E
        require(square, "num_experts", E, f"a square number with product_keys={keys!r}")

    def _check_shared(self) -> None:
        router, weighed = self.router, self.router.shared_experts
        if weighed:
            require(self.expert.shared_dim > 0, "shared_dim", self.expert.shared_dim, "above 0 with shared_experts")
            require(not self.expert.shared_gate, "shared_gate", True, "False with shared_experts")
        after = self.capacity is not None and self.capacity.renormalise_after_drop
        plain = not weighed and not router.learned_scale
        words = "False with shared_experts or a learned_scale"
        require(not after or plain, "renormalise_after_drop", True, words)

    def check_alone(self) -> None:
        """Raises ValueError for a mixture that reads more than vectors, which blocks and decoders do not hand it."""
        tokens, state = self.router.table_tokens, self.router.takes_state
        require(tokens == 0, "table_tokens", tokens, "0 in a block or decoder: it hands its mixtures no tokens")
        require(not state, "takes_state", state, "False in a block or decoder: it hands on no router's state")

    @property
    def num_logits(self) -> int:
        """The router's logits: of all experts, then of shared experts that it weighs."""
        return self.num_experts + self.router.shared_experts

    @property
    def network_dim(self) -> int:
        """The width of the router's state; 0 for a router without one."""
        return self.router.network_dim

    @property
    def router_outputs(self) -> int:
        """What the router's linear map answers: the logits, or the 2n numbers whose sums are n * n logits."""
        return self.num_logits if self.router.product_keys == "none" else 2 * math.isqrt(self.num_experts)

    @property
    def inner_dim(self) -> int:
        """The width that routed experts work in."""
        return self.around.latent_dim or self.model_dim

    @property
    def num_networks(self) -> int:
        """The experts that have weights."""
        return self.num_experts - self.identity_experts

    def with_capacity(self, factor: float | str | Fraction | None, **settings: object) -> "MoEConfig":
        """The contract with another capacity factor, `None` for dropless. `settings` are fields of CapacityConfig."""
        if factor is None:
            require(not settings, "capacity_factor", None, "a number when " + ", ".join(settings) + " is set")
            return dataclasses.replace(self, capacity=None)
        base = self.capacity or CapacityConfig()
        capacity = dataclasses.replace(base, **{"factor": factor, "slots": None, **settings})  # type: ignore[arg-type]
        return dataclasses.replace(self, capacity=capacity)

    def group_size(self, batch_size: int, num_positions: int) -> int:
        """S, the number of tokens in a group, for an input of B sequences and T positions; at least 1."""
        if self.capacity is None or self.capacity.group == "batch":
            return max(batch_size * num_positions, 1)
        if self.capacity.group == "sequence":
            return max(num_positions, 1)
        assert self.capacity.group_size is not None
        return self.capacity.group_size

    def expert_capacity(self, group_size: int) -> int:
        """C, the number of an expert's slots in a group of S tokens; S if dropless, 0 for a group without tokens.

        Raises ValueError for a capacity below 1, unless `below_one` allows it.
        """
        if self.capacity is None or group_size == 0:
            return group_size
        rule = self.capacity
        if rule.slots is not None:
            return min(rule.slots, group_size) if rule.clamp else rule.slots
        share = Fraction(group_size * (self.top_k if rule.counts_top_k else 1), self.num_experts) * rule.exact_factor
        slots = share.numerator // share.denominator
        if rule.rounding == "ceil" and share.denominator != 1:
            slots += 1
        slots = max(-(-slots // rule.multiple) * rule.multiple, rule.minimum)
        if rule.clamp:
            slots = min(slots, group_size)
        if slots < 1 and rule.below_one == "error":
            raise ValueError(
                f"capacity factor={rule.factor}: must give at least one slot; {group_size} tokens, top_k={self.top_k}, "
                f"num_experts={self.num_experts} give {float(share):.3g} slots per expert"
            )
        return slots


def makemoe(
    model_dim: int = 128, expert_dim: int | None = None, num_experts: int = 8, top_k: int = 2,
    capacity_factor: float | None = 1.0, dropout: float = 0.1, noise: bool = True,
) -> MoEConfig:
    """makeMoE (AviSoori1x/makeMoE): top-k of noisy logits, softmax over the chosen, ReLU experts of 4x width.

    Capacity floor(B*T*K/E * factor) over the whole batch, token order, no renormalisation after drops. The noise stays
    on at evaluation. `noise=False` is makeMoE's plain top-k router.
    """
    router = RouterConfig(
        order="select_then_softmax", bias=True,
        noise="learned_gaussian" if noise else "none", noise_at_evaluation=noise,
    )
    expert = ExpertConfig(activation="relu", gated=False, bias=True, dropout=dropout)
    capacity = None if capacity_factor is None else CapacityConfig(factor=capacity_factor, below_one="drop_all")
    return MoEConfig(
        model_dim=model_dim, expert_dim=4 * model_dim if expert_dim is None else expert_dim,
        num_experts=num_experts, top_k=top_k, router=router, expert=expert, capacity=capacity,
    )


@dataclass(frozen=True, kw_only=True)
class SoftMoEConfig:
    """Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951, eq. 1-3): every slot is a mix of all tokens.

    Experts are MLPs model_dim -> hidden_dims -> model_dim. Slots mix positions, so a causal model may not use it.
    """

    model_dim: int
    num_experts: int
    num_slots: int  # per expert
    hidden_dims: tuple[int, ...] | None = None  # None: one hidden layer of model_dim
    hidden_activation: Activation = "relu"
    output_activation: Activation = "identity"
    layer_norm: bool = True  # after each hidden linear map, before its activation
    output_layer_norm: bool = False  # after the last linear map, before its activation
    residual: bool = True  # around each layer of an expert with equal input and output widths
    normalise: bool = False  # logits from tokens and phi scaled to unit length, times a learned scale (section 2.3)

    def __post_init__(self) -> None:
        check_literals(self)
        check_positive_ints(model_dim=self.model_dim, num_experts=self.num_experts, num_slots=self.num_slots)
        check_flags(self, "layer_norm", "output_layer_norm", "residual", "normalise")
        hidden: object = (self.model_dim,) if self.hidden_dims is None else self.hidden_dims
        if not isinstance(hidden, (tuple, list)):
            raise ValueError(f"hidden_dims={self.hidden_dims!r}: must be None or integers of at least 1")
        for width in hidden:
            require(is_int(width) and width >= 1, "hidden_dims", self.hidden_dims, "integers of at least 1")
        object.__setattr__(self, "hidden_dims", tuple(hidden))

    @property
    def widths(self) -> tuple[int, ...]:
        """model_dim, the hidden widths, model_dim."""
        assert self.hidden_dims is not None
        return (self.model_dim, *self.hidden_dims, self.model_dim)
