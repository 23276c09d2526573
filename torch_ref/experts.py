"""The feed-forward network of one expert, as three linear maps."""

import torch
from torch import nn
from torch.nn import functional as F

from jax_moe.config import ExpertConfig, MoEConfig
from torch_ref.activations import activate
from torch_ref.dims import Float, Tensor, wide


def linear(x: Float[Tensor, "*any X"], layer: nn.Linear) -> Float[Tensor, "*any Y"]:
    """`layer(x)` in the input's dtype, whatever dtype the parameters are stored in."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def expert_ffn(
    x_RD: Float[Tensor, "*any D"], up: nn.Linear, down: nn.Linear, gate: nn.Linear | None, config: ExpertConfig
) -> Float[Tensor, "*any D"]:
    """The expert's answer: act(x up) down, or (act(x gate) * (x up + offset)) down, gate and up clamped where asked."""
    up_RF = linear(x_RD, up)
    if gate is None:
        return linear(activate(config.activation, up_RF), down)
    gate_RF = linear(x_RD, gate)
    if config.gate_softcap is not None or config.up_softcap is not None:
        wider = wide(x_RD.dtype)
        soft_RF = _soft(up_RF.to(wider), config.up_softcap) + config.up_offset
        return linear((_soft_gate(gate_RF.to(wider), config) * soft_RF).to(x_RD.dtype), down)
    before = config.clamp if config.clamp_on == "gate" else None
    after = config.clamp if config.clamp_on == "activation" else None
    gate_RF = activate(config.activation, gate_RF if before is None else gate_RF.clamp(max=before))
    gate_RF = gate_RF if after is None else gate_RF.clamp(max=after)
    if config.clamp is not None:
        up_RF = up_RF.clamp(min=-config.clamp, max=config.clamp)
    return linear(gate_RF * (up_RF + config.up_offset), down)


def _soft(x: Float[Tensor, "*any"], bound: float | None) -> Float[Tensor, "*any"]:
    """bound * tanh(x / bound), or x without a bound."""
    return x if bound is None else (x / bound).tanh() * bound


def _soft_gate(gate: Float[Tensor, "*any"], config: ExpertConfig) -> Float[Tensor, "*any"]:
    """The gate, softly bounded but for its sigmoid."""
    if config.gate_softcap is None:
        return activate(config.activation, gate)
    return _soft(gate, config.gate_softcap) * gate.sigmoid()


class Expert(nn.Module):
    """One feed-forward network: `up` [F, D], `down` [D, F] and, where the contract is gated, `gate` [F, D]."""

    def __init__(self, model_dim: int, expert_dim: int, config: ExpertConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(model_dim, expert_dim, bias=config.bias) if config.gated else None
        self.up = nn.Linear(model_dim, expert_dim, bias=config.bias)
        self.down = nn.Linear(expert_dim, model_dim, bias=config.bias)

    def forward(self, x_RD: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        """The answer, in the input's dtype."""
        return expert_ffn(x_RD, self.up, self.down, self.gate, self.config)


class Nothing(nn.Module):
    """An expert that answers nothing."""

    def forward(self, x_RD: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        """Zeros."""
        return torch.zeros_like(x_RD)


def make_experts(config: MoEConfig) -> nn.ModuleList:
    """The routed experts of a layer; the last may return their input, or answer nothing."""
    experts = (Expert(config.inner_dim, config.expert_dim, config.expert) for _ in range(config.num_networks))
    same = nn.Identity if config.identity_answer == "input" else Nothing
    return nn.ModuleList([*experts, *(same() for _ in range(config.identity_experts))])
