"""Logits -> Routing: the experts that each token goes to, and the weights of their answers."""

import math
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from jax_moe.config import MoEConfig, RouterConfig, require
from torch_ref.arrays import check_kind
from torch_ref.dims import Float, Int, Tensor, wide
from torch_ref.top_k import best_first


class Routing(NamedTuple):
    """The router's decisions, before any drops."""

    expert_GSK: Int[Tensor, "G S K"]  # the k-th choice of each token
    weight_GSK: Float[Tensor, "G S K"]  # the weight of that expert's answer; fp32 or wider
    logits_GSE: Float[Tensor, "G S E"]  # the logits chosen from, noise included; the losses read them
    own_GSK: Int[Tensor, "G S K"]  # the router's own choices: others than expert_GSK where another run's are replayed
    shared_GSY: Float[Tensor, "G S Y"] | None = None  # weights of shared experts, where the router weighs them


def router_logits(
    x_GSD: Float[Tensor, "G S D"],
    kernel_DE: Float[Tensor, "D E"],
    bias_E: Float[Tensor, " E"] | None,
    dtype: Literal["float32", "input"] = "float32",
) -> Float[Tensor, "G S E"]:
    """x W + b, computed in fp32 or wider, or in the input's dtype and then widened."""
    compute = wide(x_GSD.dtype) if dtype == "float32" else x_GSD.dtype
    bias_E = None if bias_E is None else bias_E.to(compute)
    return F.linear(x_GSD.to(compute), kernel_DE.T.to(compute), bias_E).to(wide(x_GSD.dtype))


def softplus(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """ln(1 + e^x), exact in fp64: torch's default threshold of 20 drops e^-20 = 2e-9; 40 drops less than rounding."""
    return F.softplus(x, threshold=40)


def product_logits(half_BTO: Float[Tensor, "B T O"], keys: str) -> Float[Tensor, "B T E"]:
    """The logits of n * n experts, the sums of two of 2n numbers: of the token's own ("own"), or of the numbers of all
    tokens in a row, of which the first half and the second are told off token by token ("flat").
    """
    n = half_BTO.shape[-1] // 2
    if keys == "flat":
        row, count = half_BTO.flatten(), half_BTO[..., :n].numel()
        half_BTO = torch.cat([row[:count].view(-1, n), row[count:].view(-1, n)], dim=-1).view(half_BTO.shape)
    return torch.cat([half_BTO[..., i, None] + half_BTO[..., n:] for i in range(n)], dim=-1)


def noise_scale(noise_logits_GSE: Float[Tensor, "G S E"]) -> Float[Tensor, "G S E"]:
    """Standard deviation of the learned noise, softplus(x W_noise) (Shazeer et al. 2017, arXiv 1701.06538, eq. 4)."""
    return softplus(noise_logits_GSE)


def expert_scores(logits_GSE: Float[Tensor, "G S E"], config: RouterConfig) -> Float[Tensor, "G S E"]:
    """Scores of all experts; the logits themselves where the softmax follows the choice."""
    if config.order != "score_then_select":
        return logits_GSE
    if config.score == "softmax":
        return logits_GSE.softmax(dim=-1)
    if config.score == "sigmoid":
        return logits_GSE.sigmoid()
    score_GSE = softplus(logits_GSE)
    vanished = score_GSE == 0  # the gradient of sqrt there is 0 * inf
    return score_GSE.masked_fill(vanished, 1).sqrt().masked_fill(vanished, 0)


def log_scores(logits_GSE: Float[Tensor, "G S E"], config: RouterConfig) -> Float[Tensor, "G S E"]:
    """Logarithms of the scores, up to a constant per token: their softmax over E is the scores over their sum.

    Scores below the smallest normal number, which the choice cannot tell from 0, are raised to that number.
    """
    least = math.log(torch.finfo(logits_GSE.dtype).tiny)
    if config.score == "sigmoid":
        return F.logsigmoid(logits_GSE).clamp(min=least)
    if config.score == "sqrt_softplus":
        return softplus(logits_GSE).clamp(min=torch.finfo(logits_GSE.dtype).tiny).log() / 2
    return logits_GSE


def limit_to_clusters(score_GSE: Float[Tensor, "G S E"], config: RouterConfig) -> Float[Tensor, "G S E"]:
    """Scores, replaced by -inf or 0 for every expert outside the token's best `top_clusters` clusters."""
    clusters = score_GSE.chunk(config.num_clusters, dim=-1)
    counted = 1 if config.cluster_score == "max" else 2
    cluster_GSN = torch.stack(
        [cluster.sort(dim=-1, descending=True).values[..., :counted].sum(dim=-1) for cluster in clusters], dim=-1
    )
    chosen = best_first(cluster_GSN, config.top_clusters)
    fill = -torch.inf if config.cluster_fill == "neg_inf" else 0.0
    limited = []
    for n, cluster in enumerate(clusters):
        outside_GS1 = (chosen != n).all(dim=-1, keepdim=True)
        limited.append(cluster.masked_fill(outside_GS1, fill))
    return torch.cat(limited, dim=-1)


def select_experts(
    score_GSE: Float[Tensor, "G S E"], config: MoEConfig, correction_bias_E: Float[Tensor, " E"] | None = None,
    logits_GSE: Float[Tensor, "G S E"] | None = None,
) -> Int[Tensor, "G S K"]:
    """The K best experts of each token, best first, by score or, where given, by logit; of equals the lower index."""
    compared_GSE = score_GSE if logits_GSE is None else logits_GSE
    choice_GSE = compared_GSE.detach()
    if correction_bias_E is not None:
        choice_GSE = choice_GSE + correction_bias_E.detach().to(choice_GSE.dtype)
    if config.router.num_clusters > 1:
        choice_GSE = limit_to_clusters(choice_GSE, config.router)
    return best_first(choice_GSE, config.top_k)


def update_correction_bias(
    bias_E: Float[Tensor, "*L E"], tokens_E: Int[Tensor, "*L E"], rate: float, recentre: bool = False
) -> Float[Tensor, "*L E"]:
    """The correction bias after a step: b + rate * sign(mean load - load), loads as `tokens_per_expert` counts them
    over all tokens of the step, on all devices (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    The comparison is one of integers, so that an expert with exactly the mean load stays. `recentre` subtracts the
    mean of the signs first, which keeps the mean of the bias (torchtitan). The result is in the bias's dtype.
    Raises ValueError for loads that are no integers (shares are rounded) or of another shape, and for a bias in half
    precision, which would lose small steps.
    """
    bias_E, tokens_E = check_kind("bias_E", bias_E), check_kind("tokens_E", tokens_E).long()
    shape, dtype = tuple(bias_E.shape), str(bias_E.dtype).removeprefix("torch.")
    wide_enough = bias_E.dtype == wide(bias_E.dtype)
    require(wide_enough, "bias_E.dtype", dtype, "float32 or wider: half precision loses small steps")
    require(tokens_E.shape == shape, "tokens_E.shape", tuple(tokens_E.shape), f"{shape}, the shape of bias_E")
    total, num_experts = tokens_E.sum(dim=-1, keepdim=True), tokens_E.shape[-1]
    sign_E = (total - num_experts * tokens_E).sign().to(bias_E.dtype)
    if recentre:
        sign_E = sign_E - sign_E.mean(dim=-1, keepdim=True)
    return bias_E + rate * sign_E


def choice_weights(
    score_GSE: Float[Tensor, "G S X"], expert_GSK: Int[Tensor, "G S K"], config: RouterConfig
) -> Float[Tensor, "G S K"]:
    """The weight of each choice: its score (or a softmax over the K), renormalised and scaled as the contract says."""
    weight_GSK = score_GSE.gather(-1, expert_GSK)
    if config.order == "select_then_softmax":
        weight_GSK = weight_GSK.softmax(dim=-1)
    if config.order == "sparse_mixer":
        weight_GSK = mixer_weights(score_GSE, expert_GSK, config.mixer_eps)
    if config.renormalise == "sum":
        weight_GSK = weight_GSK / safe_denominator(weight_GSK.sum(dim=-1, keepdim=True))
    if config.renormalise == "eps":
        weight_GSK = weight_GSK / safe_denominator(weight_GSK.sum(dim=-1, keepdim=True) + config.renormalise_eps)
    if config.renormalise == "floor":
        weight_GSK = weight_GSK / weight_GSK.sum(dim=-1, keepdim=True).clamp(min=config.renormalise_eps)
    return weight_GSK * config.scale


def mixer_weights(
    logits_GSE: Float[Tensor, "G S E"], expert_GSK: Int[Tensor, "G S K"], eps: float
) -> Float[Tensor, "G S K"]:
    """Each choice's share in a softmax over the experts near the best that earlier choices left; 0 if it is not near.

    The gradient is that of these softmaxes, the sets of experts held fixed. Phi-3.5-MoE was trained on drawn choices
    with an estimate in place of the gradient (SparseMixer-v2, arXiv 2409.12136, section 2.2), which is not here.
    """
    weights, taken_GSE, fixed_GSE = [], torch.zeros_like(logits_GSE, dtype=torch.bool), logits_GSE.detach()
    for expert_GS1 in expert_GSK.split(1, dim=-1):
        best_GS1 = fixed_GSE.masked_fill(taken_GSE, -torch.inf).amax(dim=-1, keepdim=True)
        size_GSE = fixed_GSE.abs().maximum(best_GS1)
        away = taken_GSE | ((best_GS1 - fixed_GSE) / safe_denominator(size_GSE) > 2 * eps)
        part_GSE = (logits_GSE - best_GS1).masked_fill(away, -torch.inf).exp()
        weights.append(part_GSE.gather(-1, expert_GS1) / part_GSE.sum(dim=-1, keepdim=True))
        taken_GSE = taken_GSE.scatter(-1, expert_GS1, True)
    return torch.cat(weights, dim=-1)


def safe_denominator(total: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """`total`, or 1 where it is 0, so that neither the quotient nor its gradient is NaN."""
    return total.masked_fill(total == 0, 1)


def route(
    logits_GSX: Float[Tensor, "G S X"],
    config: MoEConfig,
    correction_bias_E: Float[Tensor, " E"] | None = None,
    expert_GSK: Int[Tensor, "G S K"] | None = None,
    scale_E: Float[Tensor, " E"] | None = None,
    learned_scale: Float[Tensor, " 1"] | None = None,
) -> Routing:
    """Choices and weights, each times its expert's `scale_E` and `learned_scale`, if given. A given `expert_GSK`
    replays another run's choices: the weights are theirs.

    Logits of shared experts that the router weighs stand after those of the E: to the rule that makes weights of the
    choices' scores they are further experts, which every token chose last.
    """
    logits_GSE = logits_GSX[..., : config.num_experts]
    score_GSE = expert_scores(logits_GSE, config.router)
    compared_GSE = logits_GSE if config.router.selection == "logit" else None
    if config.router.table_tokens:  # the choices of a table come as if replayed
        assert expert_GSK is not None
        own_GSK = expert_GSK.long()
    else:
        own_GSK = select_experts(score_GSE, config, correction_bias_E, compared_GSE)
    expert_GSK = own_GSK if expert_GSK is None else expert_GSK.long()
    weight_GSK, shared_GSY = choice_weights(score_GSE, expert_GSK, config.router), None
    if config.router.shared_experts:
        last_Y = torch.arange(config.num_experts, config.num_logits, device=expert_GSK.device)
        every_GSX = torch.cat([expert_GSK, last_Y.expand(*expert_GSK.shape[:2], -1)], dim=-1)
        weight_GSX = choice_weights(expert_scores(logits_GSX, config.router), every_GSX, config.router)
        weight_GSK, shared_GSY = weight_GSX[..., : config.top_k], weight_GSX[..., config.top_k :]
    if scale_E is not None:
        weight_GSK = weight_GSK * scale_E.to(weight_GSK.dtype)[expert_GSK]
    if learned_scale is not None:
        weight_GSK = weight_GSK * learned_scale
        shared_GSY = None if shared_GSY is None else shared_GSY * learned_scale
    return Routing(expert_GSK, weight_GSK, logits_GSE, own_GSK, shared_GSY)
