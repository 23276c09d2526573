"""MoE: tokens -> routing -> dispatch -> experts -> combine.

The work is in `moe_routing` and `moe_forward`, which take a layer's weights as `Parts`. The modules here and in
`models/` differ only in the names of their weights.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypedDict, Unpack

import torch
from torch import nn
from torch.nn import functional as F

from jax_moe.config import MixtureNorm, MoEConfig
from jax_moe.config.parameters import Role
from torch_ref.arrays import check_moe_arrays
from torch_ref.dims import Bool, Float, Int, Tensor, wide
from torch_ref.dispatch import (
    Moves,
    Slots,
    assign_slots,
    loop_dispatch,
    merge_groups,
    round_weights,
    single_answers,
    split_groups,
)
from torch_ref.experts import Expert, Nothing, linear, make_experts
from torch_ref.losses import MoEStats, layer_stats
from torch_ref.norms import MixtureScale
from torch_ref.router_network import RouterNetwork
from torch_ref.routing import Routing, noise_scale, product_logits, route, router_logits


class Parts(NamedTuple):
    """The weights of a layer, whatever their names in the module."""

    config: MoEConfig
    router: nn.Linear | RouterNetwork
    noise_router: nn.Linear | None
    correction_bias_E: Float[Tensor, " E"] | None
    experts: Sequence[Callable]
    shared: Callable | None = None
    shared_gate: nn.Linear | None = None
    latent_in: nn.Linear | None = None
    latent_out: nn.Linear | None = None
    latent_norm: nn.Module | None = None
    answer_norm: nn.Module | None = None
    output_norm: nn.Module | None = None
    input_norm: nn.Module | None = None
    routed_norm: nn.Module | None = None
    shared_input_norm: nn.Module | None = None
    shared_norm: nn.Module | None = None
    router_scale_D: Float[Tensor, " D"] | None = None
    expert_scale_E: Float[Tensor, " E"] | None = None
    learned_scale: Float[Tensor, " 1"] | None = None
    shared_experts: nn.ModuleList | None = None
    answer_bias_D: Float[Tensor, " D"] | None = None
    table_VK: Int[Tensor, "V K"] | None = None


class MoEArrays(TypedDict, total=False):
    """The tensors that only a sparse layer takes, as `MoE` explains them."""

    noise_BTE: Float[Tensor, "B T E"] | None
    jitter_BTD: Float[Tensor, "B T D"] | None
    keep_BTKD: Bool[Tensor, "B T K D"] | None
    expert_BTK: Int[Tensor, "B T K"] | None
    tokens_BT: Int[Tensor, "B T"] | None
    router_state_BTI: Float[Tensor, "B T I"] | None


class MoEOutput(NamedTuple):
    """What one call of a layer computes."""

    y_BTD: Float[Tensor, "B T D"]
    stats: MoEStats
    routing: Routing  # in groups, before anything is dropped
    slots: Slots
    capacity: int  # C: a choice at slot C was dropped
    stages: dict[str, Tensor] | None = None  # every intermediate value [B, T, ...] by name, where asked for
    router_state_BTI: Float[Tensor, "B T I"] | None = None  # of a router that is a network, for the next mixture's

    @property
    def expert_BTK(self) -> Int[Tensor, "B T K"]:
        """The experts every token was sent to, best first."""
        return merge_groups(self.routing.expert_GSK, *self.y_BTD.shape[:2])


def moe_logits(
    x_BTD: Float[Tensor, "B T D"], noise_BTE: Float[Tensor, "B T E"] | None, parts: Parts,
    before_BTI: Float[Tensor, "B T I"] | None = None,
) -> tuple[Float[Tensor, "B T X"], Float[Tensor, "B T I"] | None]:
    """The router's logits plus the noise, which is scaled by softplus(x W_noise) if the contract has learned noise; and
    the state of a router that is a network.
    """

    def logits_of(layer: nn.Linear) -> Tensor:
        return router_logits(x_BTD, layer.weight.T, layer.bias, parts.config.router.dtype)

    router, state_BTI = parts.config.router, None
    if parts.router_scale_D is not None:
        wide_x = x_BTD.to(wide(x_BTD.dtype))
        rms = (wide_x.square().mean(dim=-1, keepdim=True) + router.input_norm_eps).sqrt()
        scale_D = parts.router_scale_D.to(x_BTD.dtype)
        x_BTD = (wide_x / rms).to(x_BTD.dtype) * scale_D / parts.config.model_dim**0.5
    if isinstance(parts.router, RouterNetwork):
        logits_BTE, state_BTI = parts.router(x_BTD, before_BTI)
    else:
        logits_BTE = logits_of(parts.router)
    if router.product_keys != "none":
        logits_BTE = product_logits(logits_BTE, router.product_keys)
    logits_BTE = logits_BTE * router.logit_scale
    if noise_BTE is None:
        return logits_BTE, state_BTI
    noise_BTE = F.pad(noise_BTE.to(logits_BTE.dtype), (0, parts.config.router.shared_experts))
    if parts.noise_router is not None:
        noise_BTE = noise_BTE * noise_scale(logits_of(parts.noise_router))
    return logits_BTE + noise_BTE, state_BTI


def moe_routing(
    x_BTD: Float[Tensor, "B T D"],
    parts: Parts,
    *,
    training: bool,
    mask_BT: Bool[Tensor, "B T"] | None = None,
    noise_BTE: Float[Tensor, "B T E"] | None = None,
    jitter_BTD: Float[Tensor, "B T D"] | None = None,
    expert_BTK: Int[Tensor, "B T K"] | None = None,
    router_state_BTI: Float[Tensor, "B T I"] | None = None,
) -> tuple[Tensor, Routing, Slots, int, Tensor | None, Tensor | None]:
    """Grouped tokens, choices, slots, the capacity C, the mask of real tokens (None: all are real) and the router's
    state.

    The tensors are those of `MoE`, already checked.
    """
    config, router = parts.config, parts.config.router
    B, T, _ = x_BTD.shape
    noisy = training or router.noise_at_evaluation
    draws: dict[str, Any] = {"dtype": wide(x_BTD.dtype), "device": x_BTD.device}
    if router.noise == "learned_gaussian" and noise_BTE is None and noisy:
        noise_BTE = torch.randn(B, T, config.num_experts, **draws)
    if router.noise == "input_jitter" and jitter_BTD is None and noisy:
        jitter_BTD = torch.empty(x_BTD.shape, **draws).uniform_(1 - router.jitter_eps, 1 + router.jitter_eps)
    if mask_BT is not None:  # 0 * NaN would still be NaN
        x_BTD = x_BTD.where(mask_BT[..., None], 0)
    router_input_BTD = x_BTD if jitter_BTD is None else (x_BTD * jitter_BTD).to(x_BTD.dtype)
    if router.jitter_scope == "block":
        x_BTD = router_input_BTD
    S = config.group_size(B, T)
    capacity = config.expert_capacity(S) if B * T else 1
    mask_GS = None
    if mask_BT is not None or B * T % S != 0 or B * T == 0:
        real_BT = torch.ones(B, T, dtype=torch.bool, device=x_BTD.device) if mask_BT is None else mask_BT
        mask_GS = split_groups(real_BT, S)
    if router_state_BTI is not None and mask_BT is not None:
        router_state_BTI = router_state_BTI.where(mask_BT[..., None], 0)
    logits_BTE, state_BTI = moe_logits(router_input_BTD, noise_BTE, parts, router_state_BTI)
    logits_GSE = split_groups(logits_BTE, S)
    if expert_BTK is not None and mask_BT is not None:  # choices of padding may be out of range
        expert_BTK = expert_BTK.where(mask_BT[..., None], expert_BTK.clamp(0, config.num_experts - 1))
    replay = None if expert_BTK is None else split_groups(expert_BTK, S)
    scales = parts.expert_scale_E, parts.learned_scale
    routing = route(logits_GSE, config, parts.correction_bias_E, replay, *scales)
    slots = assign_slots(routing, config, capacity, mask_GS)
    return split_groups(x_BTD, S), routing, slots, capacity, mask_GS, state_BTI


def moe_forward(
    x_BTD: Float[Tensor, "B T D"],
    parts: Parts,
    *,
    training: bool,
    mask_BT: Bool[Tensor, "B T"] | None = None,
    watch: bool = False,
    **arrays: Unpack[MoEArrays],
) -> MoEOutput:
    """All that a call computes. Arguments as in `MoE.run`."""
    config = parts.config
    check_moe_arrays(config, x_BTD, mask_BT=mask_BT, **arrays)
    tokens_BT, expert_BTK = arrays.get("tokens_BT"), arrays.get("expert_BTK")
    if expert_BTK is None and tokens_BT is not None and parts.table_VK is not None:
        tokens_BT = tokens_BT if mask_BT is None else tokens_BT.where(mask_BT, 0)
        rows = [parts.table_VK[token] for token in tokens_BT.flatten().tolist()]
        expert_BTK = torch.stack(rows).reshape(*tokens_BT.shape, -1) if rows else parts.table_VK[tokens_BT.long()]
    x_GSD, routing, slots, capacity, mask_GS, state_BTI = moe_routing(
        x_BTD, parts, training=training, mask_BT=mask_BT, noise_BTE=arrays.get("noise_BTE"),
        jitter_BTD=arrays.get("jitter_BTD"), expert_BTK=expert_BTK, router_state_BTI=arrays.get("router_state_BTI"),
    )
    keep_BTKD = arrays.get("keep_BTKD")
    keep_GSKD = None if keep_BTKD is None or config.expert.dropout == 0 else split_groups(keep_BTKD, x_GSD.shape[1])
    moves = Moves(config, capacity, [after(expert, parts.answer_norm) for expert in parts.experts], training, keep_GSKD)
    inner_GSD = x_GSD if parts.input_norm is None else parts.input_norm(x_GSD)
    inner_GSD = inner_GSD if parts.latent_in is None else linear(inner_GSD, parts.latent_in)
    inner_GSD = inner_GSD if parts.latent_norm is None else parts.latent_norm(inner_GSD)
    rounded, shared_GSD = round_weights(slots, config, x_BTD.dtype), None
    y_GSD = loop_dispatch(inner_GSD, routing, rounded, moves)
    y_GSD = y_GSD if parts.latent_out is None else linear(y_GSD, parts.latent_out)
    y_GSD = y_GSD if parts.routed_norm is None else parts.routed_norm(y_GSD)
    if config.expert.shared_dim:
        read_GSD = x_GSD if parts.shared_input_norm is None else parts.shared_input_norm(x_GSD)
        shared_GSD = weighed(read_GSD, routing, parts) if parts.shared is None else parts.shared(read_GSD)
        if parts.shared_gate is not None:
            shared_GSD = shared_GSD * linear(read_GSD, parts.shared_gate).sigmoid()
        shared_GSD = shared_GSD * config.expert.shared_scale
        shared_GSD = shared_GSD if parts.shared_norm is None else parts.shared_norm(shared_GSD)
        if mask_GS is not None:
            shared_GSD = shared_GSD.masked_fill(~mask_GS[..., None], 0)
        y_GSD = y_GSD + shared_GSD
    y_GSD = y_GSD if parts.output_norm is None else parts.output_norm(y_GSD)
    if parts.answer_bias_D is not None:
        biased_GSD = y_GSD + parts.answer_bias_D.to(y_GSD.dtype)
        y_GSD = biased_GSD if mask_GS is None else torch.where(mask_GS[..., None], biased_GSD, y_GSD)
    stats = layer_stats(routing, slots, config, capacity, mask_GS, x_BTD.shape[:2])
    y_BTD = merge_groups(y_GSD, *x_BTD.shape[:2])
    output = MoEOutput(y_BTD, stats, routing, slots, capacity, router_state_BTI=state_BTI)
    if not watch:
        return output
    with torch.no_grad():
        answers_GSKD = single_answers(inner_GSD, routing, rounded, moves)
    before_drops = round_weights(slots._replace(weight_GSK=routing.weight_GSK), config, x_BTD.dtype)
    found = {
        "router_logits": routing.logits_GSE, "experts": routing.own_GSK, "weights": before_drops.weight_GSK,
        "slots": slots.slot_GSK, "expert_outputs": answers_GSKD, "shared": shared_GSD,
    }
    stages = {name: merge_groups(value, *x_BTD.shape[:2]) for name, value in found.items() if value is not None}
    stages |= {"combined": output.y_BTD, "balance_loss": stats.load_balance_loss}
    return output._replace(stages=stages)


def weighed(x_GSD: Float[Tensor, "G S D"], routing: Routing, parts: Parts) -> Float[Tensor, "G S D"]:
    """The answers of shared experts, each times the weight that the router gives it, added up one after the other."""
    assert parts.shared_experts is not None and routing.shared_GSY is not None
    weight_GSY, wider = routing.shared_GSY, wide(x_GSD.dtype)
    if parts.config.router.weight_dtype == "input":
        weight_GSY = weight_GSY.to(x_GSD.dtype).to(wider)
    sum_GSD = torch.zeros(x_GSD.shape, dtype=wider, device=x_GSD.device)
    for y, expert in enumerate(parts.shared_experts):
        sum_GSD = sum_GSD + weight_GSY[..., y, None] * expert(x_GSD).to(wider)
    return sum_GSD.to(x_GSD.dtype)


def after(expert: Callable, norm: Callable | None) -> Callable:
    """The expert with a norm of its answer; one that returns its input has none."""
    if norm is None or isinstance(expert, nn.Identity | Nothing):
        return expert
    return lambda x_RD: norm(expert(x_RD))


class Router(nn.Module):
    """The router's weights: `linear`, [`noise_linear`], [`input_scale`], [`expert_scale`], [`learned_scale`], and the
    buffers [`correction_bias`] and [`expert_table`], which no gradient trains. In the place of `linear` may stand
    `keys`, of product keys, or a `network`.
    """

    correction_bias: Tensor | None
    expert_table: Tensor | None

    def __init__(self, config: MoEConfig):
        super().__init__()
        router = config.router
        self.linear = self.keys = self.network = None
        if router.network_dim:
            self.network = RouterNetwork(config)
        elif router.product_keys != "none":
            self.keys = nn.Linear(config.model_dim, config.router_outputs, bias=False)
        else:
            self.linear = nn.Linear(config.model_dim, config.num_logits, bias=router.bias)
        self.learned_scale = nn.Parameter(torch.ones(1)) if router.learned_scale else None
        learned = router.noise == "learned_gaussian"
        self.noise_linear = nn.Linear(config.model_dim, config.num_experts, bias=router.bias) if learned else None
        D, E = config.model_dim, config.num_experts
        self.input_scale = nn.Parameter(torch.ones(D)) if router.input_norm else None
        self.expert_scale = nn.Parameter(torch.ones(E)) if router.expert_scale else None
        bias_E = torch.zeros(config.num_experts, dtype=torch.float32) if router.correction_bias else None
        self.register_buffer("correction_bias", bias_E)
        table_VK = None
        if router.table_tokens:
            table_VK = (torch.arange(router.table_tokens)[:, None] + torch.arange(config.top_k)) % config.num_experts
        self.register_buffer("expert_table", table_VK)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Router":
        """`.to(dtype)` and similar, except that the correction bias stays fp32: in bf16 it would change the choices."""
        before = self.correction_bias
        super()._apply(fn, recurse)
        if before is not None and self.correction_bias is not None and self.correction_bias.dtype != torch.float32:
            self.correction_bias = before.to(self.correction_bias.device)
        return self


def make_norm(kind: MixtureNorm, width: int, eps: float) -> MixtureScale | None:
    """The norm of that kind, None for none."""
    return None if kind == "none" else MixtureScale(kind, width, eps)


class MoE(nn.Module):
    """A sparse mixture-of-experts layer under a contract, from `jax_moe.presets`.

    Parameters: `router.linear`, [`router.noise_linear`], [`router.correction_bias`], `experts.{e}.{gate,up,down}`,
    [`shared.{gate,up,down}` or `shared_experts.{y}.{gate,up,down}`], [`shared_gate`], [`latent_in`, `latent_out`],
    [`latent_norm`, `answer_norm`, `output_norm`, `input_norm`, `routed_norm`, `shared_input_norm`, `shared_norm`].
    [`answer_bias`]. Initialised as nn.Linear is.
    """

    roles: ClassVar[dict[str, Role]] = {
        "router": "router", "experts": "expert", "shared": "shared", "shared_experts": "shared",
        "latent_in": "projection", "latent_out": "projection", "latent_norm": "norm", "answer_norm": "norm",
        "output_norm": "norm", "input_norm": "norm", "routed_norm": "norm", "shared_input_norm": "norm",
        "shared_norm": "norm",
    }

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = make_experts(config)
        self.shared = self.shared_gate = None
        self.shared_experts = None
        if config.router.shared_experts:
            each = (config.model_dim, config.expert.shared_dim, config.expert.shared)
            self.shared_experts = nn.ModuleList(Expert(*each) for _ in range(config.router.shared_experts))
        elif config.expert.shared_dim:
            self.shared = Expert(config.model_dim, config.expert.shared_dim, config.expert.shared)
            if config.expert.shared_gate:
                self.shared_gate = nn.Linear(config.model_dim, 1, bias=False)
        self.answer_bias = nn.Parameter(torch.zeros(config.model_dim)) if config.answer_bias else None

        around, expert, D = config.around, config.expert, config.model_dim
        self.latent_in = self.latent_out = None
        if around.latent_dim:
            self.latent_in = nn.Linear(D, around.latent_dim, bias=False)
            self.latent_out = nn.Linear(around.latent_dim, D, bias=False)
        self.latent_norm = make_norm(around.latent_norm, around.latent_dim, around.latent_norm_eps)
        self.answer_norm = make_norm(expert.answer_norm, config.inner_dim, expert.answer_norm_eps)
        self.output_norm = make_norm(around.output_norm, D, around.output_norm_eps)
        self.input_norm, self.routed_norm, self.shared_input_norm, self.shared_norm = (
            make_norm(kind, D, around.norm_eps)
            for kind in (around.input_norm, around.routed_norm, around.shared_input_norm, around.shared_norm)
        )

    def parts(self) -> Parts:
        """The weights, for `moe_forward`."""
        router = self.router
        maps = next(each for each in (router.linear, router.keys, router.network) if each is not None)
        return Parts(
            self.config, maps, router.noise_linear, router.correction_bias, list(self.experts),
            self.shared, self.shared_gate, self.latent_in, self.latent_out, self.latent_norm, self.answer_norm,
            self.output_norm, self.input_norm, self.routed_norm, self.shared_input_norm, self.shared_norm,
            router.input_scale, router.expert_scale, router.learned_scale, self.shared_experts,
            self.answer_bias, router.expert_table,
        )

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        noise_BTE: Float[Tensor, "B T E"] | None = None,
        jitter_BTD: Float[Tensor, "B T D"] | None = None,
        keep_BTKD: Bool[Tensor, "B T K D"] | None = None,
        expert_BTK: Int[Tensor, "B T K"] | None = None,
        tokens_BT: Int[Tensor, "B T"] | None = None,
        router_state_BTI: Float[Tensor, "B T I"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MoEStats]:
        """The layer's answer in the input's dtype, and its statistics.

        Noise and dropout follow `self.training` and the contract (which may keep noise on at evaluation). Arrays
        replace draws: `noise_BTE` unit Gaussians (zeros turn the noise off; without learned noise in the contract they
        are added to the logits unscaled), `jitter_BTD` factors on the input, `keep_BTKD` True where an answer survives
        dropout. `mask_BT` is False at padding, which may hold anything, takes no slot, gets a zero answer and counts in
        no statistic.
        `expert_BTK` replays choices: K different experts for every real token. `tokens_BT` are the tokens where a table
        of them chooses (`table_tokens`): one of the two is needed there.
        `router_state_BTI` is what `run` of the mixture before returned, for a router that takes it (`takes_state`);
        without it nothing is added to the router's own.
        Without any tokens the answer is empty and statistics are 0.
        Raises ValueError, by name, for an array of another kind or shape or with an expert out of range, and for a
        capacity below one slot.
        """
        output = self.run(
            x_BTD, mask_BT=mask_BT, noise_BTE=noise_BTE, jitter_BTD=jitter_BTD, keep_BTKD=keep_BTKD,
            expert_BTK=expert_BTK, tokens_BT=tokens_BT, router_state_BTI=router_state_BTI,
        )
        return output.y_BTD, output.stats

    def run(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        watch: bool = False,
        **arrays: Unpack[MoEArrays],
    ) -> MoEOutput:
        """All that a call computes. Arguments as in a call; `watch` also hands out every stage, at the cost of the
        experts' work once more for each choice.
        """
        return moe_forward(x_BTD, self.parts(), training=self.training, mask_BT=mask_BT, watch=watch, **arrays)
