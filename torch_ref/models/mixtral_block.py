"""Mixtral's sparse block (arXiv 2401.04088) under the names of its published checkpoints."""

from typing import ClassVar

from torch import nn

from jax_moe.config import ExpertConfig, MoEConfig
from jax_moe.config.parameters import Role
from torch_ref.dims import Float, Tensor
from torch_ref.experts import expert_ffn
from torch_ref.moe import Parts, moe_forward


class MixtralBlockSparseTop2MLP(nn.Module):
    """`w1` is the gate, `w3` the up and `w2` the down projection."""

    def __init__(self, model_dim: int, expert_dim: int, config: ExpertConfig):
        super().__init__()
        self.config = config
        self.w1 = nn.Linear(model_dim, expert_dim, bias=False)
        self.w2 = nn.Linear(expert_dim, model_dim, bias=False)
        self.w3 = nn.Linear(model_dim, expert_dim, bias=False)

    def forward(self, x_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """The answer, in the input's dtype."""
        return expert_ffn(x_RD, self.w3, self.w2, self.w1, self.config)


class MixtralSparseMoeBlock(nn.Module):
    """`torch_ref.MoE` under Mixtral's names: `gate`, `experts.{e}.{w1,w2,w3}`. The contract is `presets.mixtral`.

    Raises ValueError for a contract with weights that these names cannot hold (biases, learned noise, a shared expert).
    """

    roles: ClassVar[dict[str, Role]] = {"gate": "router", "experts": "expert"}

    def __init__(self, config: MoEConfig):
        super().__init__()
        router, expert = config.router, config.expert
        extra = router.bias or router.correction_bias or router.noise == "learned_gaussian"
        if extra or expert.bias or not expert.gated or expert.shared_dim:
            allowed = "gated experts and no bias, learned noise, correction bias or shared expert"
            raise ValueError(f"config: must have {allowed}")
        self.config = config
        self.gate = nn.Linear(config.model_dim, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            [MixtralBlockSparseTop2MLP(config.model_dim, config.expert_dim, expert) for _ in range(config.num_experts)]
        )

    def forward(
        self, hidden_states: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "R E"]]:
        """The answer and the router's logits [B * T, E], as the original block returns them."""
        parts = Parts(self.config, self.gate, None, None, list(self.experts))
        y_BTD, _, routing, *_ = moe_forward(hidden_states, parts, training=self.training)
        num_tokens = hidden_states.shape[0] * hidden_states.shape[1]
        return y_BTD, routing.logits_GSE.flatten(0, 1)[:num_tokens].to(hidden_states.dtype)
