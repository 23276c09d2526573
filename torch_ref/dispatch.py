"""Routing -> experts, and back: groups, queues and drops, by plain loops over groups and experts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from jax_moe.config import MoEConfig, Priority
from torch_ref.dims import Bool, Float, Int, Shaped, Tensor, wide
from torch_ref.dropout import apply_keep
from torch_ref.routing import Routing, safe_denominator


class Slots(NamedTuple):
    """The position of each choice in its expert's queue, after drops."""

    slot_GSK: Int[Tensor, "G S K"]  # 0 .. C-1; exactly C for a choice that was dropped or belongs to padding
    weight_GSK: Float[Tensor, "G S K"]  # 0 for a dropped choice


class Moves(NamedTuple):
    """What a dispatcher needs besides tokens, routing and slots."""

    config: MoEConfig
    capacity: int
    experts: Sequence[Callable]  # each x_RD -> y_RD
    training: bool  # draws the dropout mask
    keep_GSKD: Bool[Tensor, "G S K D"] | None  # a given dropout mask


def split_groups(x_BT: Shaped[Tensor, "B T *rest"], group_size: int) -> Shaped[Tensor, "G S *rest"]:
    """Tokens in flat order cut into groups of S, at least one group; the last group is padded with zeros."""
    flat = x_BT.flatten(0, 1)
    short = -flat.shape[0] % group_size if flat.shape[0] else group_size
    if short:
        flat = torch.cat([flat, flat.new_zeros(short, *flat.shape[1:])])
    return flat.unflatten(0, (-1, group_size))


def merge_groups(x_GS: Shaped[Tensor, "G S *rest"], batch_size: int, num_positions: int) -> Shaped[Tensor, "B T *rest"]:
    """Inverse of `split_groups`."""
    return x_GS.flatten(0, 1)[: batch_size * num_positions].reshape(batch_size, num_positions, *x_GS.shape[2:])


def expert_queue(
    expert_SK: Int[Tensor, "S K"], weight_SK: Float[Tensor, "S K"], expert: int, priority: Priority,
    mask_S: Bool[Tensor, " S"] | None = None,
) -> Int[Tensor, " R"]:
    """The choices (token * K + k) of this expert in a group, in the order in which it takes them."""
    wants_SK = expert_SK == expert
    if mask_S is not None:
        wants_SK = wants_SK & mask_S[:, None]
    if priority in ("choice", "batch"):
        order_S = torch.arange(expert_SK.shape[0], device=expert_SK.device)
        if priority == "batch":
            order_S = torch.sort(weight_SK.detach().amax(dim=1), descending=True, stable=True).indices
        k_R, row_R = wants_SK[order_S].T.nonzero(as_tuple=True)  # row by row: first choices, then second choices
        return order_S[row_R] * expert_SK.shape[1] + k_R
    queue_R = wants_SK.flatten().nonzero().squeeze(1)
    if priority == "probability":
        order_R = torch.sort(weight_SK.detach().flatten()[queue_R], descending=True, stable=True).indices
        queue_R = queue_R[order_R]
    return queue_R


def assign_slots(
    routing: Routing, config: MoEConfig, capacity: int, mask_GS: Bool[Tensor, "G S"] | None = None
) -> Slots:
    """Slots of the first C choices in every expert's queue; the others are dropped."""
    priority = config.capacity.priority if config.capacity else "token"
    slot_GSK = torch.full_like(routing.expert_GSK, capacity)
    for g, slot_SK in enumerate(slot_GSK):
        slot_R = slot_SK.view(-1)
        mask_S = None if mask_GS is None else mask_GS[g]
        for expert in range(config.num_networks):
            queue_R = expert_queue(routing.expert_GSK[g], routing.weight_GSK[g], expert, priority, mask_S)[:capacity]
            slot_R[queue_R] = torch.arange(queue_R.shape[0], device=queue_R.device)
    same_GSK = routing.expert_GSK >= config.num_networks  # experts that return their input: no queues, no drops
    slot_GSK[same_GSK if mask_GS is None else same_GSK & mask_GS.unsqueeze(-1)] = 0
    weight_GSK = routing.weight_GSK.masked_fill(slot_GSK == capacity, 0)
    if config.capacity is not None and config.capacity.renormalise_after_drop:
        weight_GSK = weight_GSK / safe_denominator(weight_GSK.sum(dim=-1, keepdim=True)) * config.router.scale
    return Slots(slot_GSK, weight_GSK)


def round_weights(slots: Slots, config: MoEConfig, dtype: torch.dtype) -> Slots:
    """Weights rounded to the input's dtype if the contract says so (Qwen), else in fp32 or wider (Mixtral)."""
    if config.router.weight_dtype == "float32":
        return slots
    return slots._replace(weight_GSK=slots.weight_GSK.to(dtype).to(slots.weight_GSK.dtype))


def loop_dispatch(
    x_GSD: Float[Tensor, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Tensor, "G S D"]:
    """A loop over the experts: each expert's rows are gathered, answered, weighted and added back, as in makeMoE.

    An expert without rows is called too, so that its gradient is zeros. Optimizers would skip a gradient of None.
    """
    config, dtype = moves.config, x_GSD.dtype
    num_choices = routing.expert_GSK.shape[-1]
    x_flat, weight_flat = x_GSD.flatten(0, 1), slots.weight_GSK.flatten()
    # a dropped choice belongs to no expert
    owner_flat = routing.expert_GSK.masked_fill(slots.slot_GSK == moves.capacity, -1).flatten()
    keep_flat = None if moves.keep_GSKD is None else moves.keep_GSKD.flatten(0, 2)
    sum_flat = torch.zeros(x_flat.shape, dtype=wide(dtype), device=x_flat.device)
    for e, expert in enumerate(moves.experts):
        choice_R = (owner_flat == e).nonzero().squeeze(1)
        token_R = choice_R // num_choices
        x_RD, weight_R1 = x_flat[token_R], weight_flat[choice_R, None]
        if config.expert.weight_on == "input":
            x_RD = (x_RD * weight_R1).to(dtype)
        y_RD = expert(x_RD)
        if keep_flat is not None:
            y_RD = apply_keep(y_RD, keep_flat[choice_R], config.expert.dropout)
        elif config.expert.dropout > 0:
            y_RD = F.dropout(y_RD, config.expert.dropout, moves.training)
        if config.expert.weight_on == "output":
            y_RD = y_RD * weight_R1
        sum_flat.index_add_(0, token_R, y_RD.to(sum_flat.dtype))
    return sum_flat.to(dtype).view_as(x_GSD)


def single_answers(
    x_GSD: Float[Tensor, "G S D"], routing: Routing, slots: Slots, moves: Moves
) -> Float[Tensor, "G S K D"]:
    """What each choice's expert answers before it is weighted; 0 where it was dropped.

    The dispatcher runs once for every k, as if that were each token's only choice. Without dropout.
    """
    alone = moves._replace(config=replace(moves.config, top_k=1), training=False, keep_GSKD=None)
    weight_GSK = slots.weight_GSK
    if moves.config.expert.weight_on == "output":
        weight_GSK = torch.ones_like(weight_GSK)

    def of_choice(k: int) -> Tensor:
        three = (routing.expert_GSK, slots.slot_GSK, weight_GSK)
        expert_GS1, slot_GS1, weight_GS1 = (each[..., k, None] for each in three)
        return loop_dispatch(x_GSD, routing._replace(expert_GSK=expert_GS1), Slots(slot_GS1, weight_GS1), alone)

    return torch.stack([of_choice(k) for k in range(moves.config.top_k)], dim=2)
