"""Soft MoE: every slot reads a mix of all tokens, every token reads a mix of all slots."""

from typing import ClassVar, NamedTuple

import torch
from torch import nn

from jax_moe.config import Activation, SoftMoEConfig
from jax_moe.config.parameters import Role
from torch_ref.activations import activate
from torch_ref.arrays import checked, checked_input
from torch_ref.dims import Bool, Float, Tensor, wide
from torch_ref.experts import linear
from torch_ref.losses import MoEStats, masked_mean, router_entropy, router_probs, squared_cv
from torch_ref.norms import normed

UNIT_EPS = 1e-6  # added to a squared length under the root, as in V-MoE's soft router: a zero vector stays zero


def unit(x: Float[Tensor, "*any"], axis: int) -> Float[Tensor, "*any"]:
    """Vectors along `axis` scaled to length 1: x / sqrt(sum x^2 + 1e-6)."""
    return x / (x.square().sum(dim=axis, keepdim=True) + UNIT_EPS).sqrt()


def soft_logits(
    x_BTD: Float[Tensor, "B T D"], phi_DEC: Float[Tensor, "D E C"], mask_BT: Bool[Tensor, "B T"] | None = None,
    scale: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "B T E C"]:
    """x phi in fp32 or wider.

    Logits at padding are the most negative finite number, not -inf, so that a sequence of only padding stays finite:
    its slots read the plain mean of the tokens. C counts slots per expert. With a `scale`, tokens and columns of phi
    are scaled to unit length for the logits, which are multiplied by it (section 2.3); the slots mix the unscaled
    tokens.
    """
    compute = wide(x_BTD.dtype)
    x, phi = x_BTD.to(compute), phi_DEC.to(compute).flatten(1)
    logits = x @ phi if scale is None else unit(x, axis=-1) @ unit(phi, axis=0) * scale.to(compute)  # [B, T, E * C]
    if mask_BT is not None:
        logits = logits.masked_fill(~mask_BT[..., None], -torch.finfo(compute).max)
    return logits.unflatten(2, phi_DEC.shape[1:])


def soft_weights(logits_BTEC: Float[Tensor, "B T E C"]) -> tuple[Float[Tensor, "B T E C"], Float[Tensor, "B T E C"]]:
    """Dispatch weights (softmax over tokens) and combine weights (softmax over all slots)."""
    combine = logits_BTEC.flatten(2).softmax(dim=2)
    return logits_BTEC.softmax(dim=1), combine.unflatten(2, logits_BTEC.shape[2:])


def soft_stats(logits_BTEC: Float[Tensor, "B T E C"], mask_BT: Bool[Tensor, "B T"] | None = None) -> MoEStats:
    """Statistics of the real tokens' combine weights, which are summed over the slots of each expert.

    Where a sparse layer counts choices, `expert_load_E` is the mean of these weights and equals `router_prob_E`; both
    squared CVs are of it, and `router_entropy` is the weights'. Nothing is dropped and there is no loss: these are 0.
    """
    logits_BTE = logits_BTEC.logsumexp(dim=3)  # their softmax sums the combine weights of each expert
    load_E = masked_mean(router_probs(logits_BTE), mask_BT)
    none, cv2 = load_E.new_zeros(()), squared_cv(load_E)
    return MoEStats(
        load_balance_loss=none, router_z_loss=none, dropped_fraction=none, expert_load_E=load_E,
        router_entropy=router_entropy(logits_BTE, mask_BT), router_prob_E=load_E, importance_cv2=cv2, load_cv2=cv2,
        balance_load_E=load_E,
    )


class SoftMoEOutput(NamedTuple):
    """What one call of a layer computes."""

    y_BTD: Float[Tensor, "B T D"]
    stats: MoEStats
    stages: dict[str, Tensor] | None = None  # every intermediate value by name, where asked for
    expert_BTK: None = None  # no choices: every token goes to every expert


class SoftExpert(nn.Module):
    """An MLP of any depth: linear, [layer norm], activation; with a residual where input and output widths agree."""

    def __init__(self, config: SoftMoEConfig):
        super().__init__()
        self.config = config
        *hidden, last = zip(config.widths[:-1], config.widths[1:], strict=True)
        self.fcs = nn.ModuleList([nn.Linear(rows, columns) for rows, columns in hidden])
        self.layer_norms = nn.ModuleList([nn.LayerNorm(columns) for _, columns in hidden] if config.layer_norm else [])
        self.last_fc = nn.Linear(*last)
        self.last_ln = nn.LayerNorm(config.model_dim) if config.output_layer_norm else None
        for layer in (*self.fcs, self.last_fc):
            nn.init.orthogonal_(layer.weight, gain=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BCD: Float[Tensor, "B C D"]) -> Float[Tensor, "B C D"]:
        """The MLP's answer, in the input's dtype."""
        for i, fc in enumerate(self.fcs):
            norm = self.layer_norms[i] if self.config.layer_norm else None
            assert isinstance(fc, nn.Linear) and isinstance(norm, nn.LayerNorm | None)
            x_BCD = self._layer(x_BCD, fc, norm, self.config.hidden_activation)
        return self._layer(x_BCD, self.last_fc, self.last_ln, self.config.output_activation)

    def _layer(self, x: Tensor, fc: nn.Linear, norm: nn.LayerNorm | None, activation: Activation) -> Tensor:
        h = linear(x, fc)
        if norm is not None:
            h = normed(h, norm)
        h = activate(activation, h)
        return x + h if self.config.residual and fc.in_features == fc.out_features else h


class SoftMoE(nn.Module):
    """Soft MoE (arXiv 2308.00951, eq. 1-3): parameters `phi` [D, E, C] ~ N(0, 1), `experts` in a list,
    and where the contract normalises `scale` [], 1 at first.

    The input is any sequence of vectors, not only images. It mixes positions: `BlockConfig` refuses it in a causal
    block.
    """

    roles: ClassVar[dict[str, Role]] = {"phi": "router", "experts": "soft_expert"}

    def __init__(self, config: SoftMoEConfig):
        super().__init__()
        self.config = config
        self.phi = nn.Parameter(torch.randn(config.model_dim, config.num_experts, config.num_slots))
        self.scale = nn.Parameter(torch.ones(())) if config.normalise else None
        self.experts = nn.ModuleList([SoftExpert(config) for _ in range(config.num_experts)])

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], *, mask_BT: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], MoEStats]:
        """The layer's answer in the input's dtype, and its statistics (`soft_stats`). It draws nothing.

        Padding (mask_BT False) feeds no slot and counts in no statistic; its own answer is the plain mean of the slots
        and means nothing. Raises ValueError for a tensor of another kind or shape.
        """
        output = self.run(x_BTD, mask_BT=mask_BT)
        return output.y_BTD, output.stats

    def run(
        self, x_BTD: Float[Tensor, "B T D"], *, mask_BT: Bool[Tensor, "B T"] | None = None, watch: bool = False
    ) -> SoftMoEOutput:
        """All that a call computes. Arguments as in a call; `watch` also hands out every stage."""
        checked(checked_input("x_BTD", x_BTD, self.config.model_dim), mask_BT=mask_BT)
        if mask_BT is not None:  # 0 * NaN would still be NaN
            x_BTD = x_BTD.where(mask_BT[..., None], 0)
        logits_BTEC = soft_logits(x_BTD, self.phi, mask_BT, self.scale)
        dispatch_BTEC, combine_BTEC = soft_weights(logits_BTEC)
        sum_BTD = torch.zeros_like(x_BTD, dtype=dispatch_BTEC.dtype)
        inputs, answers = [], []
        for e, expert in enumerate(self.experts):
            x_BCD = (dispatch_BTEC[:, :, e].transpose(1, 2) @ x_BTD.to(dispatch_BTEC.dtype)).to(x_BTD.dtype)
            y_BCD = expert(x_BCD)
            sum_BTD = sum_BTD + combine_BTEC[:, :, e] @ y_BCD.to(sum_BTD.dtype)
            inputs.append(x_BCD)
            answers.append(y_BCD)
        output = SoftMoEOutput(sum_BTD.to(x_BTD.dtype), soft_stats(logits_BTEC, mask_BT))
        if not watch:
            return output
        return output._replace(stages={
            "dispatch_weights": dispatch_BTEC, "combine_weights": combine_BTEC, "slot_inputs": torch.stack(inputs),
            "expert_outputs": torch.stack(answers), "combined": output.y_BTD,
        })
