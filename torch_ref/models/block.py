"""The transformer block: attention and a mixture of experts, each after a norm and in a residual."""

from typing import Any

from torch import nn

from jax_moe.config import BlockConfig, SoftMoEConfig
from torch_ref.arrays import checked_input
from torch_ref.attention.multihead import Attention
from torch_ref.dims import Bool, Float, Int, Tensor
from torch_ref.losses import MoEStats
from torch_ref.moe import MoE
from torch_ref.norms import normed
from torch_ref.soft_moe import SoftMoE


def block_forward(
    x_BTD: Float[Tensor, "B T D"],
    attention_norm: nn.LayerNorm,
    attention: nn.Module,
    moe_norm: nn.LayerNorm,
    moe: nn.Module,
    *,
    mask_BT: Bool[Tensor, "B T"] | None = None,
    attention_keep_BHTU: Bool[Tensor, "B H T U"] | None = None,
    output_keep_BTD: Bool[Tensor, "B T D"] | None = None,
    **arrays: Any,
) -> tuple[Float[Tensor, "B T D"], Any, dict[str, Tensor]]:
    """x += attention(norm(x)); x += moe(norm(x)). The block's answer, all that `moe` answered, and its own stages."""
    normed_BTD = normed(x_BTD, attention_norm)
    attended_BTD = attention(
        normed_BTD, mask_BT=mask_BT, attention_keep_BHTU=attention_keep_BHTU, output_keep_BTD=output_keep_BTD
    )
    x_BTD = x_BTD + attended_BTD
    ffn_BTD = normed(x_BTD, moe_norm)
    answer = moe(ffn_BTD, mask_BT=mask_BT, **arrays)
    y_BTD = x_BTD + answer[0]
    own = {"attention_norm": normed_BTD, "attention": attended_BTD, "ffn_norm": ffn_BTD, "residual": y_BTD}
    return y_BTD, answer, own


class Block(nn.Module):
    """x += attention(norm(x)); x += moe(norm(x)). `moe` is sparse or, if attention is not causal, soft."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        self.attention_norm = nn.LayerNorm(config.attention.model_dim, eps=config.norm_eps)
        self.attention = Attention(config.attention)
        self.moe_norm = nn.LayerNorm(config.attention.model_dim, eps=config.norm_eps)
        self.moe = SoftMoE(config.moe) if isinstance(config.moe, SoftMoEConfig) else MoE(config.moe)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        mask_BT: Bool[Tensor, "B T"] | None = None,
        noise_BTE: Float[Tensor, "B T E"] | None = None,
        jitter_BTD: Float[Tensor, "B T D"] | None = None,
        keep_BTKD: Bool[Tensor, "B T K D"] | None = None,
        attention_keep_BHTU: Bool[Tensor, "B H T U"] | None = None,
        output_keep_BTD: Bool[Tensor, "B T D"] | None = None,
        expert_BTK: Int[Tensor, "B T K"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MoEStats]:
        """The block's answer and its mixture's statistics. Arguments as in `MoE` and `Attention`.

        Raises ValueError for a tensor of another kind or shape, and for a sparse layer's if the mixture is soft.
        """
        checked_input("x_BTD", x_BTD, self.config.attention.model_dim)
        used = self.config.used(noise_BTE=noise_BTE, jitter_BTD=jitter_BTD, keep_BTKD=keep_BTKD, expert_BTK=expert_BTK)
        y_BTD, answer, _ = block_forward(
            x_BTD, self.attention_norm, self.attention, self.moe_norm, self.moe, mask_BT=mask_BT,
            attention_keep_BHTU=attention_keep_BHTU, output_keep_BTD=output_keep_BTD, **used,
        )
        return y_BTD, answer[1]
