"""The next token's loss, and losses and statistics of routing: values in fp32 or wider; padding never counts.

Every function raises ValueError, by name, for arrays of another kind or of shapes that do not fit each other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from jax_moe.arrays import check_choices, check_kind, check_vocabulary, checked, checked_input
from jax_moe.config.checks import require
from jax_moe.config.moe import BalanceConfig, MoEConfig, RouterConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, wide
from jax_moe.dispatch import Slots, merge_groups
from jax_moe.routing import Routing, log_scores, safe_denominator
from jax_moe.shapes import Dim
from jax_moe.sharding.explicit import auto_inside
from jax_moe.top_k import best_first

SOFTMAX = RouterConfig()


class MoEStats(NamedTuple):
    """Statistics of one layer over its unpadded tokens; for a stack of layers each field has a leading L."""

    load_balance_loss: Float[Array, "*L"]  # E * sum_e f_e P_e
    router_z_loss: Float[Array, "*L"]  # mean over tokens of logsumexp(logits)^2
    dropped_fraction: Float[Array, "*L"]  # share of choices that got no slot
    expert_load_E: Float[Array, "*L E"]  # share of choices per expert, before drops; sums to 1
    router_entropy: Float[Array, "*L"]  # mean entropy of each token's scores over their sum, in nats
    router_prob_E: Float[Array, "*L E"]  # P_e, the mean over tokens of `balance_terms`' probabilities
    importance_cv2: Float[Array, "*L"]  # CV^2 of the weight given to each expert (a loss: it has a gradient)
    load_cv2: Float[Array, "*L"]  # CV^2 of expert_load_E (no gradient; `smooth_load` has one)
    balance_load_E: Float[Array, "*L E"]  # f_e over its sum: expert_load_E, unless the balance loss is of="logits"


def chosen_experts(stats: MoEStats, config: MoEConfig | None = None) -> Bool[Array, "*L E"]:
    """Which experts had a token after drops. In PyTorch only these get a gradient; `unchosen="skip"` needs the mask.

    With any priority the first choice in an expert's queue gets a slot, if there are slots. So an expert has no tokens
    only if no token chose it, or if the capacity is 0 and everything is dropped. With a contract whose last experts
    return their input the mask ends before those.
    """
    chosen_E = (stats.expert_load_E > 0) & (stats.dropped_fraction < 1)[..., None]
    return chosen_E if config is None else chosen_E[..., : config.num_networks]


@auto_inside("logits_BTV")
def next_token_loss(
    logits_BTV: Float[Array, "B T V"], target_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """The mean cross-entropy of the targets, each the token after its position, in nats, over positions where the mask
    is True.

    Raises ValueError for a target outside the vocabulary, where it is visible.
    """
    logits_BTV, sizes = checked_input("logits_BTV", logits_BTV)
    given = checked(sizes, target_BT=target_BT, mask_BT=mask_BT)
    target_BT, mask_BT = given["target_BT"], given.get("mask_BT")
    target_BT = target_BT if mask_BT is None else jnp.where(mask_BT, target_BT, 0)
    check_vocabulary(target_BT, logits_BTV.shape[-1])
    logits_BTV = logits_BTV.astype(wide(logits_BTV.dtype))
    chosen_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return masked_mean(jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT, mask_BT)


def _given(name: str, value: Array, mask_GS: Array | None = None, **others: Any) -> list[Any]:
    """The checked arrays, floats in fp32 or wider; last the mask, or None. `value` sets the dims of the others."""
    value, sizes = checked_input(name, value)
    found = checked(sizes, **others)
    wider = [x.astype(wide(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in (value, *found.values())]
    return [*wider, checked(sizes, mask_GS=mask_GS).get("mask_GS")]


def masked_mean(x_GS: Float[Array, "G S *rest"], mask_GS: Bool[Array, "G S"] | None) -> Float[Array, "*rest"]:
    """Mean over the unpadded tokens; 0 if there are none."""
    x_GS = check_kind("x_GS", x_GS)
    x_GS = x_GS.astype(wide(x_GS.dtype))
    if mask_GS is None:
        return x_GS.sum(axis=(0, 1)) / max(x_GS.shape[0] * x_GS.shape[1], 1)
    sizes = {letter: Dim(size, "x_GS", letter) for letter, size in zip("GS", x_GS.shape, strict=False)}
    mask_GS = checked(sizes, mask_GS=mask_GS)["mask_GS"]
    keep = mask_GS.reshape(mask_GS.shape + (1,) * (x_GS.ndim - 2)).astype(x_GS.dtype)
    return (x_GS * keep).sum(axis=(0, 1)) / safe_denominator(keep.sum())


def expert_load(
    expert_GSK: Int[Array, "G S K"], num_experts: int, dtype: DTypeLike, mask_GS: Bool[Array, "G S"] | None = None
) -> Float[Array, " E"]:
    """Share of all choices that went to each expert, in `dtype`; sums to 1."""
    expert_GSK, mask_GS = _choices(expert_GSK, num_experts, mask_GS)
    share_GSE = jax.nn.one_hot(expert_GSK, num_experts, dtype=wide(dtype)).mean(axis=2)
    return masked_mean(share_GSE, mask_GS).astype(dtype)


def tokens_per_expert(
    expert_GSK: Int[Array, "G S K"], num_experts: int, mask_GS: Bool[Array, "G S"] | None = None
) -> Int[Array, " E"]:
    """How many choices went to each expert: what `update_correction_bias` takes, summed over the parts of a step."""
    expert_GSK, mask_GS = _choices(expert_GSK, num_experts, mask_GS)
    chosen_GSE = jax.nn.one_hot(expert_GSK, num_experts, dtype=jnp.int32).sum(axis=2)
    return (chosen_GSE if mask_GS is None else chosen_GSE * mask_GS[..., None]).sum(axis=(0, 1))


def _choices(expert_GSK: Array, num_experts: int, mask_GS: Array | None) -> list[Any]:
    check_choices("expert_GSK", check_kind("expert_GSK", expert_GSK), num_experts, mask_GS, different=False)
    return _given("expert_GSK", expert_GSK, mask_GS)


def router_probs(logits_GSE: Float[Array, "G S E"], config: RouterConfig = SOFTMAX) -> Float[Array, "G S E"]:
    """Each token's scores over their sum: softmax(logits), or s / sum(s) for sigmoid and sqrt_softplus scores."""
    logits_GSE, _ = _given("logits_GSE", logits_GSE)
    return jax.nn.softmax(log_scores(logits_GSE, config), axis=-1)


def load_balance_loss(
    load_E: Float[Array, "*L E"], prob_E: Float[Array, "*L E"], top_k: int, config: BalanceConfig
) -> Float[Array, "*L"]:
    """E * sum_e f_e P_e (Switch Transformers, eq. 4): 1 when balanced, or K where f sums to K (Hugging Face)."""
    load_E, prob_E = (check_kind(name, x).astype(wide(x.dtype)) for name, x in (("load_E", load_E), ("prob_E", prob_E)))
    same = load_E.shape == prob_E.shape
    require(same, "prob_E.shape", prob_E.shape, f"{load_E.shape}, the shape of load_E")
    num_experts = load_E.shape[-1]
    f_E = load_E * top_k if config.f_sums_to == "k" else load_E
    return num_experts * (f_E * prob_E).sum(axis=-1)


def balance_terms(routing: Routing, config: MoEConfig) -> tuple[Int[Array, "G S K"], Float[Array, "G S E"]]:
    """The choices that f counts, and the probabilities whose mean is P."""
    if config.balance.of == "choices":
        return routing.expert_GSK, router_probs(routing.logits_GSE, config.router)
    scored = config.router if config.balance.of == "scores" else SOFTMAX  # scores are in the order of their logits
    largest_GSK = best_first(jax.lax.stop_gradient(routing.logits_GSE), config.top_k)
    return largest_GSK, router_probs(routing.logits_GSE, scored)


def group_balance_loss(
    routing: Routing, config: MoEConfig, mask_GS: Bool[Array, "G S"] | None = None
) -> Float[Array, ""]:
    """The mean of the groups' balance losses (Mesh TensorFlow's switch gating); groups of padding do not count.

    Groups that are sequences give DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, eq. 17 to 20).
    """
    counted_GSK, prob_GSE = balance_terms(routing, config)
    share_GSE = jax.nn.one_hot(counted_GSK, config.num_experts, dtype=routing.logits_GSE.dtype).mean(axis=2)
    mask_GS = jnp.ones(share_GSE.shape[:2], bool) if mask_GS is None else mask_GS
    load_GE, prob_GE = (
        jax.vmap(masked_mean)(x_GSE[:, None], mask_GS[:, None])
        for x_GSE in (share_GSE, prob_GSE)
    )
    loss_G = load_balance_loss(load_GE, prob_GE, config.top_k, config.balance)
    return masked_mean(loss_G[None], mask_GS.any(axis=1)[None])


def pool_balance_loss(stats: MoEStats, config: MoEConfig) -> Float[Array, ""]:
    """The balance loss of a stack: the mean of its layers' losses, or the loss of f and P averaged over the layers."""
    if config.balance.pooled == "per_layer":
        return stats.load_balance_loss.mean()
    load_E, prob_E = stats.balance_load_E, stats.router_prob_E
    num_experts = load_E.shape[-1]
    same = num_experts == config.num_experts
    require(same, "num_experts", config.num_experts, f"{num_experts}, as in the statistics")
    load_E, prob_E = (x.reshape(-1, x.shape[-1]).mean(axis=0) for x in (load_E, prob_E))
    return load_balance_loss(load_E, prob_E, config.top_k, config.balance)


def router_z_loss(logits_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"] | None = None) -> Float[Array, ""]:
    """mean logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    logits_GSE, mask_GS = _given("logits_GSE", logits_GSE, mask_GS)
    return masked_mean(jax.nn.logsumexp(logits_GSE, axis=-1) ** 2, mask_GS)


def router_entropy(
    logits_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"] | None = None, config: RouterConfig = SOFTMAX
) -> Float[Array, ""]:
    """Mean entropy of `router_probs` in nats: ln E when undecided, 0 when certain."""
    logits_GSE, mask_GS = _given("logits_GSE", logits_GSE, mask_GS)
    log_GSE = jax.nn.log_softmax(log_scores(logits_GSE, config), axis=-1)
    return masked_mean(-(jnp.exp(log_GSE) * log_GSE).sum(axis=-1), mask_GS)


def squared_cv(x_E: Float[Array, " E"]) -> Float[Array, ""]:
    """Squared coefficient of variation, population variance / mean^2 (Shazeer et al. 2017, eq. 7 and 11)."""
    x_E, _ = _given("x_E", x_E)
    return x_E.var() / safe_denominator(x_E.mean() ** 2)


def importance(
    expert_GSK: Int[Array, "G S K"], weight_GSK: Float[Array, "G S K"], num_experts: int,
    mask_GS: Bool[Array, "G S"] | None = None,
) -> Float[Array, " E"]:
    """The weight given to each expert before drops, summed over tokens (Shazeer et al. 2017, eq. 6)."""
    _choices(expert_GSK, num_experts, mask_GS)
    expert_GSK, weight_GSK, mask_GS = _given("expert_GSK", expert_GSK, mask_GS, weight_GSK=weight_GSK)
    given_GSE = (weight_GSK[..., None] * jax.nn.one_hot(expert_GSK, num_experts, dtype=weight_GSK.dtype)).sum(axis=2)
    if mask_GS is not None:
        given_GSE = given_GSE * mask_GS[..., None].astype(given_GSE.dtype)
    return given_GSE.sum(axis=(0, 1))


def smooth_load(
    clean_GSE: Float[Array, "G S E"], noisy_GSE: Float[Array, "G S E"], scale_GSE: Float[Array, "G S E"], top_k: int,
    mask_GS: Bool[Array, "G S"] | None = None,
) -> Float[Array, " E"]:
    """Expected tokens of each expert if its noise were redrawn (Shazeer et al. 2017, eq. 8-10); has a gradient.

    An expert is chosen if its clean logit plus fresh noise exceeds the K-th best of the others; with K = E always.
    """
    clean_GSE, noisy_GSE, scale_GSE, mask_GS = _given(
        "clean_GSE", clean_GSE, mask_GS, noisy_GSE=noisy_GSE, scale_GSE=scale_GSE
    )
    require(1 <= top_k <= noisy_GSE.shape[-1], "top_k", top_k, f"1 to {noisy_GSE.shape[-1]}, the E of noisy_GSE")
    if top_k == noisy_GSE.shape[-1]:
        chance_GSE = jnp.ones_like(clean_GSE)
    else:
        best = jax.lax.top_k(noisy_GSE, top_k + 1)[0]
        inside_GSE = noisy_GSE > best[..., top_k, None]
        bar_GSE = jnp.where(inside_GSE, best[..., top_k, None], best[..., top_k - 1, None])
        chance_GSE = norm.cdf((clean_GSE - bar_GSE) / scale_GSE)
    if mask_GS is not None:
        chance_GSE = chance_GSE * mask_GS[..., None].astype(chance_GSE.dtype)
    return chance_GSE.sum(axis=(0, 1))


def layer_stats(
    routing: Routing, slots: Slots, config: MoEConfig, capacity: int, mask_GS: Bool[Array, "G S"] | None = None,
    sequences: tuple[int, ...] | None = None,
) -> MoEStats:
    """All of a layer's losses and statistics. `sequences`: B and T, for a balance loss of each sequence."""
    dtype = routing.logits_GSE.dtype
    load_E = expert_load(routing.expert_GSK, config.num_experts, dtype, mask_GS)
    counted_GSK, prob_GSE = balance_terms(routing, config)
    balance_load_E = load_E
    if config.balance.of != "choices":
        balance_load_E = expert_load(counted_GSK, config.num_experts, dtype, mask_GS)
    prob_E = masked_mean(prob_GSE, mask_GS)
    balance = load_balance_loss(balance_load_E, prob_E, config.top_k, config.balance)
    if config.balance.counted_in == "group":
        balance = group_balance_loss(routing, config, mask_GS)
    if config.balance.counted_in == "sequence":
        if sequences is None:
            raise ValueError("sequences=None: must be B and T when counted_in='sequence'")
        by_sequence = Routing(*(merge_groups(x, *sequences) for x in routing if x is not None))
        mask_BT = None if mask_GS is None else merge_groups(mask_GS, *sequences)
        balance = group_balance_loss(by_sequence, config, mask_BT)
    dropped_GS = (slots.slot_GSK == capacity).astype(dtype).mean(axis=-1)
    return MoEStats(
        load_balance_loss=balance,
        router_z_loss=router_z_loss(routing.logits_GSE, mask_GS),
        dropped_fraction=masked_mean(dropped_GS, mask_GS),
        expert_load_E=load_E,
        router_entropy=router_entropy(routing.logits_GSE, mask_GS, config.router),
        router_prob_E=prob_E,
        importance_cv2=squared_cv(importance(routing.expert_GSK, routing.weight_GSK, config.num_experts, mask_GS)),
        load_cv2=squared_cv(load_E),
        balance_load_E=balance_load_E,
    )
