"""The next token's loss, and losses and statistics of routing: values in fp32 or wider; padding never counts.

Every function raises ValueError, by name, for tensors of another kind or of shapes that do not fit each other.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from jax_moe.config import BalanceConfig, MoEConfig, RouterConfig, require
from torch_ref.arrays import Dim, check_choices, check_kind, check_vocabulary, checked, checked_input
from torch_ref.dims import Bool, Float, Int, Shaped, Tensor, wide
from torch_ref.dispatch import Slots, merge_groups
from torch_ref.routing import Routing, log_scores, safe_denominator
from torch_ref.top_k import best_first

SOFTMAX = RouterConfig()


class MoEStats(NamedTuple):
    """Statistics of one layer over its unpadded tokens; for a stack of layers each field has a leading L."""

    load_balance_loss: Float[Tensor, "*L"]  # E * sum_e f_e P_e
    router_z_loss: Float[Tensor, "*L"]  # mean over tokens of logsumexp(logits)^2
    dropped_fraction: Float[Tensor, "*L"]  # share of choices that got no slot
    expert_load_E: Float[Tensor, "*L E"]  # share of choices per expert, before drops; sums to 1
    router_entropy: Float[Tensor, "*L"]  # mean entropy of each token's scores over their sum, in nats
    router_prob_E: Float[Tensor, "*L E"]  # P_e, the mean over tokens of `balance_terms`' probabilities
    importance_cv2: Float[Tensor, "*L"]  # CV^2 of the weight given to each expert (a loss: it has a gradient)
    load_cv2: Float[Tensor, "*L"]  # CV^2 of expert_load_E (no gradient; `smooth_load` has one)
    balance_load_E: Float[Tensor, "*L E"]  # f_e over its sum: expert_load_E, unless the balance loss is of="logits"


def chosen_experts(stats: MoEStats, config: MoEConfig | None = None) -> Bool[Tensor, "*L E"]:
    """Which experts had a token after drops. A module that skips the others leaves their gradients None.

    With any priority the first choice in an expert's queue gets a slot, if there are slots. So an expert has no tokens
    only if no token chose it, or if the capacity is 0 and everything is dropped. With a contract whose last experts
    return their input the mask ends before those.
    """
    chosen_E = (stats.expert_load_E > 0) & (stats.dropped_fraction < 1).unsqueeze(-1)
    return chosen_E if config is None else chosen_E[..., : config.num_networks]


def next_token_loss(
    logits_BTV: Float[Tensor, "B T V"], target_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the targets, each the token after its position, in nats, over positions where the mask
    is True.

    Raises ValueError for a target outside the vocabulary.
    """
    checked(checked_input("logits_BTV", logits_BTV), target_BT=target_BT, mask_BT=mask_BT)
    target_R = real_tokens(target_BT, mask_BT).long()
    check_vocabulary(target_R, logits_BTV.shape[-1])
    nats = F.cross_entropy(_widened(real_tokens(logits_BTV, mask_BT)), target_R, reduction="sum")
    return nats / max(len(target_R), 1)


def real_tokens(x_GS: Shaped[Tensor, "G S *rest"], mask_GS: Bool[Tensor, "G S"] | None) -> Shaped[Tensor, "R *rest"]:
    """The unpadded tokens as rows."""
    return x_GS.flatten(0, 1) if mask_GS is None else x_GS[mask_GS]


def _widened(x: Tensor) -> Tensor:
    """In fp32 or wider."""
    return x.to(wide(x.dtype))


def _checked_choices(expert_GSK: Tensor, num_experts: int, mask_GS: Tensor | None) -> None:
    """Raises ValueError for choices of another kind or shape, or outside 0 to num_experts - 1."""
    checked(checked_input("expert_GSK", expert_GSK), mask_GS=mask_GS)
    check_choices("expert_GSK", expert_GSK, num_experts, mask_GS, different=False)


def masked_mean(x_GS: Float[Tensor, "G S *rest"], mask_GS: Bool[Tensor, "G S"] | None) -> Float[Tensor, "*rest"]:
    """Mean over the unpadded tokens; 0 if there are none."""
    x_GS = _widened(check_kind("x_GS", x_GS))
    sizes = {letter: Dim(size, "x_GS", letter) for letter, size in zip("GS", x_GS.shape, strict=False)}
    checked(sizes, mask_GS=mask_GS)
    rows = real_tokens(x_GS, mask_GS)
    return rows.sum(dim=0) / max(rows.shape[0], 1)


def expert_load(
    expert_GSK: Int[Tensor, "G S K"], num_experts: int, dtype: torch.dtype, mask_GS: Bool[Tensor, "G S"] | None = None
) -> Float[Tensor, " E"]:
    """Share of all choices that went to each expert, in `dtype`; sums to 1."""
    _checked_choices(expert_GSK, num_experts, mask_GS)
    named = real_tokens(expert_GSK, mask_GS).flatten()
    share_E = torch.bincount(named, minlength=num_experts).to(wide(dtype)) / max(named.shape[0], 1)
    return share_E.to(dtype)


def tokens_per_expert(
    expert_GSK: Int[Tensor, "G S K"], num_experts: int, mask_GS: Bool[Tensor, "G S"] | None = None
) -> Int[Tensor, " E"]:
    """How many choices went to each expert: what `update_correction_bias` takes, summed over the parts of a step."""
    _checked_choices(expert_GSK, num_experts, mask_GS)
    return torch.bincount(real_tokens(expert_GSK, mask_GS).flatten(), minlength=num_experts)


def router_probs(logits_GSE: Float[Tensor, "G S E"], config: RouterConfig = SOFTMAX) -> Float[Tensor, "G S E"]:
    """Each token's scores over their sum: softmax(logits), or s / sum(s) for sigmoid and sqrt_softplus scores."""
    checked_input("logits_GSE", logits_GSE)
    return log_scores(_widened(logits_GSE), config).softmax(dim=-1)


def load_balance_loss(
    load_E: Float[Tensor, "*L E"], prob_E: Float[Tensor, "*L E"], top_k: int, config: BalanceConfig
) -> Float[Tensor, "*L"]:
    """E * sum_e f_e P_e (Switch Transformers, eq. 4): 1 when balanced, or K where f sums to K (Hugging Face)."""
    load_E, prob_E = _widened(check_kind("load_E", load_E)), _widened(check_kind("prob_E", prob_E))
    same = load_E.shape == prob_E.shape
    require(same, "prob_E.shape", tuple(prob_E.shape), f"{tuple(load_E.shape)}, the shape of load_E")
    num_experts = load_E.shape[-1]
    f_E = load_E * top_k if config.f_sums_to == "k" else load_E
    return num_experts * (f_E * prob_E).sum(dim=-1)


def balance_terms(routing: Routing, config: MoEConfig) -> tuple[Int[Tensor, "G S K"], Float[Tensor, "G S E"]]:
    """The choices that f counts, and the probabilities whose mean is P."""
    if config.balance.of == "choices":
        return routing.expert_GSK, router_probs(routing.logits_GSE, config.router)
    scored = config.router if config.balance.of == "scores" else SOFTMAX  # scores are in the order of their logits
    return best_first(routing.logits_GSE.detach(), config.top_k), router_probs(routing.logits_GSE, scored)


def group_balance_loss(
    routing: Routing, config: MoEConfig, mask_GS: Bool[Tensor, "G S"] | None = None
) -> Float[Tensor, ""]:
    """The mean of the groups' balance losses (Mesh TensorFlow's switch gating); groups of padding do not count.

    Groups that are sequences give DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, eq. 17 to 20).
    """
    dtype, losses = routing.logits_GSE.dtype, []
    counted_GSK, prob_GSE = balance_terms(routing, config)
    for g in range(routing.logits_GSE.shape[0]):
        mask = None if mask_GS is None else mask_GS[g : g + 1]
        if mask is None or mask.any():
            load_E = expert_load(counted_GSK[g : g + 1], config.num_experts, dtype, mask)
            prob_E = masked_mean(prob_GSE[g : g + 1], mask)
            losses.append(load_balance_loss(load_E, prob_E, config.top_k, config.balance))
    return torch.stack(losses).mean() if losses else routing.logits_GSE.new_zeros(())


def pool_balance_loss(stats: MoEStats, config: MoEConfig) -> Float[Tensor, ""]:
    """The balance loss of a stack: the mean of its layers' losses, or the loss of f and P averaged over the layers."""
    if config.balance.pooled == "per_layer":
        return stats.load_balance_loss.mean()
    num_experts, found = config.num_experts, stats.expert_load_E.shape[-1]
    require(found == num_experts, "num_experts", num_experts, f"{found}, as in the statistics")
    load_E = stats.balance_load_E.reshape(-1, num_experts).mean(dim=0)
    prob_E = stats.router_prob_E.reshape(-1, num_experts).mean(dim=0)
    return load_balance_loss(load_E, prob_E, config.top_k, config.balance)


def router_z_loss(logits_GSE: Float[Tensor, "G S E"], mask_GS: Bool[Tensor, "G S"] | None = None) -> Float[Tensor, ""]:
    """mean logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    checked(checked_input("logits_GSE", logits_GSE), mask_GS=mask_GS)
    return masked_mean(_widened(logits_GSE).logsumexp(dim=-1) ** 2, mask_GS)


def router_entropy(
    logits_GSE: Float[Tensor, "G S E"], mask_GS: Bool[Tensor, "G S"] | None = None, config: RouterConfig = SOFTMAX
) -> Float[Tensor, ""]:
    """Mean entropy of `router_probs` in nats: ln E when undecided, 0 when certain."""
    checked(checked_input("logits_GSE", logits_GSE), mask_GS=mask_GS)
    log_GSE = log_scores(_widened(logits_GSE), config).log_softmax(dim=-1)
    return masked_mean(-(log_GSE.exp() * log_GSE).sum(dim=-1), mask_GS)


def squared_cv(x_E: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation, population variance / mean^2 (Shazeer et al. 2017, eq. 7 and 11)."""
    checked_input("x_E", x_E)
    x_E = _widened(x_E)
    return x_E.var(correction=0) / safe_denominator(x_E.mean() ** 2)


def importance(
    expert_GSK: Int[Tensor, "G S K"], weight_GSK: Float[Tensor, "G S K"], num_experts: int,
    mask_GS: Bool[Tensor, "G S"] | None = None,
) -> Float[Tensor, " E"]:
    """The weight given to each expert before drops, summed over tokens (Shazeer et al. 2017, eq. 6)."""
    _checked_choices(expert_GSK, num_experts, mask_GS)
    checked(checked_input("expert_GSK", expert_GSK), weight_GSK=weight_GSK)
    named = real_tokens(expert_GSK, mask_GS).flatten()
    given = _widened(real_tokens(weight_GSK, mask_GS)).flatten()
    return given.new_zeros(num_experts).index_add(0, named, given)


def smooth_load(
    clean_GSE: Float[Tensor, "G S E"], noisy_GSE: Float[Tensor, "G S E"], scale_GSE: Float[Tensor, "G S E"], top_k: int,
    mask_GS: Bool[Tensor, "G S"] | None = None,
) -> Float[Tensor, " E"]:
    """Expected tokens of each expert if its noise were redrawn (Shazeer et al. 2017, eq. 8-10); has a gradient.

    An expert is chosen if its clean logit plus fresh noise exceeds the K-th best of the others; with K = E always.
    """
    checked(checked_input("clean_GSE", clean_GSE), noisy_GSE=noisy_GSE, scale_GSE=scale_GSE, mask_GS=mask_GS)
    num_experts = clean_GSE.shape[-1]
    require(1 <= top_k <= num_experts, "top_k", top_k, f"1 to {num_experts}, the E of noisy_GSE")
    clean_RE, noisy_RE, scale_RE = (_widened(real_tokens(x, mask_GS)) for x in (clean_GSE, noisy_GSE, scale_GSE))
    if top_k == num_experts:
        return torch.ones_like(clean_RE).sum(dim=0)
    load = []
    for e in range(num_experts):
        others = torch.cat([noisy_RE[:, :e], noisy_RE[:, e + 1 :]], dim=1)
        bar_R = others.sort(dim=1, descending=True, stable=True).values[:, top_k - 1]
        load.append(torch.special.ndtr((clean_RE[:, e] - bar_R) / scale_RE[:, e]).sum())
    return torch.stack(load)


def layer_stats(
    routing: Routing, slots: Slots, config: MoEConfig, capacity: int, mask_GS: Bool[Tensor, "G S"] | None = None,
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
    dropped_GS = (slots.slot_GSK == capacity).to(dtype).mean(dim=-1)
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
