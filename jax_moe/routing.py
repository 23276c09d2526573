"""Logits -> Routing: the experts that each token goes to, and the weights of their answers."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jax_moe.arrays import check_kind
from jax_moe.config.checks import require
from jax_moe.config.moe import MoEConfig, RouterConfig
from jax_moe.dims import Array, Float, Int, wide
from jax_moe.top_k import best_first


class Routing(NamedTuple):
    """The router's decisions, before any drops."""

    expert_GSK: Int[Array, "G S K"]  # the k-th choice of each token
    weight_GSK: Float[Array, "G S K"]  # the weight of that expert's answer; fp32 or wider
    logits_GSE: Float[Array, "G S E"]  # the logits chosen from, noise included; the losses read them
    own_GSK: Int[Array, "G S K"]  # the router's own choices: others than expert_GSK where another run's are replayed
    shared_GSY: Float[Array, "G S Y"] | None = None  # weights of shared experts, where the router weighs them


def router_logits(
    x_GSD: Float[Array, "G S D"],
    kernel_DE: Float[Array, "D E"],
    bias_E: Float[Array, " E"] | None,
    dtype: Literal["float32", "input"] = "float32",
) -> Float[Array, "G S E"]:
    """x W + b, computed in fp32 or wider, or in the input's dtype and then widened."""
    compute = wide(x_GSD.dtype) if dtype == "float32" else x_GSD.dtype
    accumulate = wide(x_GSD.dtype)
    logits_GSE = jnp.einsum(
        "GSD,DE->GSE", x_GSD.astype(compute), kernel_DE.astype(compute), preferred_element_type=accumulate
    )
    if bias_E is not None:
        logits_GSE += bias_E.astype(compute).astype(accumulate)
    return logits_GSE.astype(compute).astype(accumulate)  # rounded once, as by a fused linear map


def product_logits(
    half_BTO: Float[Array, "B T O"], keys: Literal["own", "flat"]
) -> Float[Array, "B T E"]:
    """The logits of n * n experts, expert (i, j) at i * n + j: the sums of two of 2n numbers, `RouterConfig` says which
    (product keys, arXiv 1907.05242, section 3.1; "flat" as Doge in transformers).
    """
    B, T, width = half_BTO.shape
    n = width // 2
    if keys == "own":
        first, second = jnp.split(half_BTO, 2, axis=-1)
    else:
        first, second = half_BTO.reshape(2, B, T, n)
    return (first[..., :, None] + second[..., None, :]).reshape(B, T, n * n)


def noise_scale(noise_logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
    """Standard deviation of the learned noise, softplus(x W_noise) (Shazeer et al. 2017, arXiv 1701.06538, eq. 4)."""
    return jax.nn.softplus(noise_logits_GSE)


def expert_scores(logits_GSE: Float[Array, "G S E"], config: RouterConfig) -> Float[Array, "G S E"]:
    """Scores of all experts; the logits themselves where the softmax follows the choice."""
    if config.order != "score_then_select":
        return logits_GSE
    if config.score == "softmax":
        return jax.nn.softmax(logits_GSE, axis=-1)
    if config.score == "sigmoid":
        return jax.nn.sigmoid(logits_GSE)
    score_GSE = jax.nn.softplus(logits_GSE)
    # a score that underflowed to 0 has gradient 0; that of sqrt would be 0 * inf
    return jnp.where(score_GSE > 0, jnp.sqrt(jnp.where(score_GSE > 0, score_GSE, 1)), 0)


def log_scores(logits_GSE: Float[Array, "G S E"], config: RouterConfig) -> Float[Array, "G S E"]:
    """Logarithms of the scores, up to a constant per token: their softmax over E is the scores over their sum.

    Scores below the smallest normal number, which the choice cannot tell from 0, are raised to that number.
    """
    tiny = float(jnp.finfo(logits_GSE.dtype).tiny)
    if config.score == "sigmoid":
        return jnp.maximum(jax.nn.log_sigmoid(logits_GSE), math.log(tiny))
    if config.score == "sqrt_softplus":
        return jnp.log(jnp.maximum(jax.nn.softplus(logits_GSE), tiny)) / 2
    return logits_GSE


def limit_to_clusters(score_GSE: Float[Array, "G S E"], config: RouterConfig) -> Float[Array, "G S E"]:
    """Scores, replaced by -inf or 0 for every expert outside the token's best `top_clusters` clusters."""
    G, S, E = score_GSE.shape
    score_GSNe = score_GSE.reshape(G, S, config.num_clusters, E // config.num_clusters)
    if config.cluster_score == "max":
        cluster_GSN = score_GSNe.max(axis=-1)
    else:
        cluster_GSN = jax.lax.top_k(score_GSNe, 2)[0].sum(axis=-1)
    best_GSn = best_first(cluster_GSN, config.top_clusters)
    keep_GSN = jax.nn.one_hot(best_GSn, config.num_clusters, dtype=jnp.bool_).any(axis=-2)
    fill = -jnp.inf if config.cluster_fill == "neg_inf" else 0.0
    return jnp.where(keep_GSN[..., None], score_GSNe, fill).reshape(G, S, E)


def select_experts(
    score_GSE: Float[Array, "G S E"], config: MoEConfig, correction_bias_E: Float[Array, " E"] | None = None,
    logits_GSE: Float[Array, "G S E"] | None = None,
) -> Int[Array, "G S K"]:
    """The K best experts of each token, best first, by score or, where given, by logit; of equals the lower index."""
    compared_GSE = score_GSE if logits_GSE is None else logits_GSE
    choice_GSE = jax.lax.stop_gradient(compared_GSE)
    if correction_bias_E is not None:
        choice_GSE += jax.lax.stop_gradient(correction_bias_E).astype(choice_GSE.dtype)
    if config.router.num_clusters > 1:
        choice_GSE = limit_to_clusters(choice_GSE, config.router)
    return best_first(choice_GSE, config.top_k)


def update_correction_bias(
    bias_E: Float[Array, "*L E"], tokens_E: Int[Array, "*L E"], rate: float, recentre: bool = False
) -> Float[Array, "*L E"]:
    """The correction bias after a step: b + rate * sign(mean load - load), loads as `tokens_per_expert` counts them
    over all tokens of the step, on all devices (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    The comparison is one of integers, so that an expert with exactly the mean load stays. `recentre` subtracts the
    mean of the signs first, which keeps the mean of the bias (torchtitan). The result is in the bias's dtype.
    Raises ValueError for loads that are no integers (shares are rounded) or of another shape, and for a bias in half
    precision, which would lose small steps.
    """
    bias_E, tokens_E = check_kind("bias_E", bias_E), check_kind("tokens_E", tokens_E)
    wide_enough = bias_E.dtype == wide(bias_E.dtype)
    require(wide_enough, "bias_E.dtype", str(bias_E.dtype), "float32 or wider: half precision loses small steps")
    require(tokens_E.shape == bias_E.shape, "tokens_E.shape", tokens_E.shape, f"{bias_E.shape}, the shape of bias_E")
    mean, rest = jnp.divmod(tokens_E.sum(axis=-1, keepdims=True), tokens_E.shape[-1])
    sign_E = jnp.where(tokens_E == mean, rest > 0, jnp.sign(mean - tokens_E)).astype(bias_E.dtype)
    if recentre:
        sign_E -= sign_E.mean(axis=-1, keepdims=True)
    return bias_E + jnp.asarray(rate, bias_E.dtype) * sign_E


def choice_weights(
    score_GSE: Float[Array, "G S E"], expert_GSK: Int[Array, "G S K"], config: RouterConfig,
    shared_GSY: Float[Array, "G S Y"] | None = None,
) -> Float[Array, "G S X"]:
    """The weight of each choice: its score (or a softmax over the K), renormalised and scaled as the contract says.

    Given scores of shared experts count as those of further choices, and their weights follow: X = K + Y.
    """
    if config.order == "sparse_mixer":
        weight_GSK = mixer_weights(score_GSE, expert_GSK, config.mixer_eps)
    else:
        weight_GSK = jnp.take_along_axis(score_GSE, expert_GSK, axis=-1)
    if shared_GSY is not None:
        weight_GSK = jnp.concatenate([weight_GSK, shared_GSY], axis=-1)
    if config.order == "select_then_softmax":
        weight_GSK = jax.nn.softmax(weight_GSK, axis=-1)
    if config.renormalise != "none":
        total_GS1 = weight_GSK.sum(axis=-1, keepdims=True)
        if config.renormalise == "eps":
            total_GS1 += config.renormalise_eps
        if config.renormalise == "floor":
            total_GS1 = jnp.where(total_GS1 < config.renormalise_eps, config.renormalise_eps, total_GS1)
        weight_GSK /= safe_denominator(total_GS1)
    return weight_GSK * config.scale


def mixer_weights(
    logits_GSE: Float[Array, "G S E"], expert_GSK: Int[Array, "G S K"], eps: float
) -> Float[Array, "G S K"]:
    """Each choice's share in a softmax over the experts near the best that earlier choices left; 0 if it is not near.

    The gradient is that of these softmaxes, the sets of experts held fixed. Phi-3.5-MoE was trained on drawn choices
    with an estimate in place of the gradient (SparseMixer-v2, arXiv 2409.12136, section 2.2), which is not here.
    """
    chosen_GSKE = jax.nn.one_hot(expert_GSK, logits_GSE.shape[-1], dtype=jnp.int32)
    earlier_GSKE = jnp.cumsum(chosen_GSKE, axis=-2) > chosen_GSKE
    left_GSKE = jnp.where(earlier_GSKE, -jnp.inf, logits_GSE[..., None, :])
    fixed_GS1E, best_GSK1 = jax.lax.stop_gradient((logits_GSE[..., None, :], left_GSKE.max(axis=-1, keepdims=True)))
    size_GSKE = jnp.maximum(jnp.abs(fixed_GS1E), best_GSK1)
    far_GSKE = (best_GSK1 - fixed_GS1E) / safe_denominator(size_GSKE) > 2 * eps
    share_GSKE = jax.nn.softmax(jnp.where(far_GSKE, -jnp.inf, left_GSKE), axis=-1)
    return jnp.take_along_axis(share_GSKE, expert_GSK[..., None], axis=-1)[..., 0]


def safe_denominator(total: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """`total`, or 1 where it is 0, so that neither the quotient nor its gradient is NaN."""
    return jnp.where(total == 0, jnp.ones_like(total), total)


def route(
    logits_GSX: Float[Array, "G S X"],
    config: MoEConfig,
    correction_bias_E: Float[Array, " E"] | None = None,
    expert_GSK: Int[Array, "G S K"] | None = None,
    scale_E: Float[Array, " E"] | None = None,
    learned_scale: Float[Array, " 1"] | None = None,
) -> Routing:
    """Choices and weights, each times its expert's `scale_E` and `learned_scale`, if given. A given `expert_GSK`
    replays another run's choices: the weights are theirs.

    Logits of shared experts that the router weighs stand after those of the E, and a softmax for weights is over all.
    """
    logits_GSE, shared_GSY = logits_GSX[..., : config.num_experts], None
    weighed_GSE = score_GSE = expert_scores(logits_GSE, config.router)
    if config.router.shared_experts:
        weighed_GSE, shared_GSY = jnp.split(expert_scores(logits_GSX, config.router), [config.num_experts], axis=-1)
    compared_GSE = logits_GSE if config.router.selection == "logit" else None
    if config.router.table_tokens:  # the choices of a table come as if replayed
        assert expert_GSK is not None
        own_GSK = expert_GSK
    else:
        own_GSK = select_experts(score_GSE, config, correction_bias_E, compared_GSE)
    expert_GSK = own_GSK if expert_GSK is None else expert_GSK
    weight_GSX = choice_weights(weighed_GSE, expert_GSK, config.router, shared_GSY)
    if learned_scale is not None:
        weight_GSX = weight_GSX * learned_scale.astype(weight_GSX.dtype)
    weight_GSK, K = weight_GSX[..., : config.top_k], config.top_k
    if scale_E is not None:
        weight_GSK *= scale_E.astype(weight_GSK.dtype)[expert_GSK]
    return Routing(expert_GSK, weight_GSK, logits_GSE, own_GSK, None if shared_GSY is None else weight_GSX[..., K:])
