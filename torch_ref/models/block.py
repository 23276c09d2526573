"""The transformer block: attention and a mixture of experts, each after a norm and in a residual."""

from typing import NamedTuple

from torch import nn

from jax_moe.config import BlockConfig, SoftMoEConfig, require
from torch_ref.arrays import Dim, Sizes, checked, checked_input, dims_of_settings
from torch_ref.attention.multihead import Attention
from torch_ref.dims import Bool, Float, Tensor
from torch_ref.losses import MoEStats
from torch_ref.moe import MoE
from torch_ref.norms import normed
from torch_ref.soft_moe import SoftMoE


class Randomness(NamedTuple):
    """Draws given as arrays, each with a leading L for a stack of blocks. None: drawn as mode and contract say."""

    noise_BTE: Float[Tensor, "*L B T E"] | None = None  # unit Gaussians for the router
    attention_keep_BHTU: Bool[Tensor, "*L B H T U"] | None = None  # True where dropout lets a value through
    output_keep_BTD: Bool[Tensor, "*L B T D"] | None = None
    expert_keep_BTKD: Bool[Tensor, "*L B T K D"] | None = None


def checked_draws(draws: Randomness | None, config: BlockConfig, sizes: Sizes, leading: str = "") -> Randomness:
    """The draws, checked for kind and shape, `leading` dims first. Raises ValueError also for draws that go unused."""
    draws = draws or Randomness()
    sizes = {**sizes, "U": sizes["T"], "D": Dim(config.attention.model_dim, "model_dim")}
    sizes |= dims_of_settings(config.attention, H="num_heads")
    if isinstance(config.moe, SoftMoEConfig):
        for name in ("noise_BTE", "expert_keep_BTKD"):
            require(getattr(draws, name) is None, name, "a tensor", "left out: Soft MoE draws nothing")
    else:
        sizes |= dims_of_settings(config.moe, E="num_experts", K="top_k")
    checked(sizes, leading, **draws._asdict())
    return draws


def block_forward(
    x_BTD: Float[Tensor, "B T D"],
    attention_norm: nn.LayerNorm,
    attention: nn.Module,
    moe_norm: nn.LayerNorm,
    moe: nn.Module,
    mask_BT: Bool[Tensor, "B T"] | None = None,
    randomness: Randomness | None = None,
) -> tuple[Float[Tensor, "B T D"], MoEStats | None]:
    """x += attention(norm(x)); x += moe(norm(x)). The statistics of Soft MoE are None."""
    draws = randomness or Randomness()
    x_BTD = x_BTD + attention(
        normed(x_BTD, attention_norm), mask_BT=mask_BT, attention_keep_BHTU=draws.attention_keep_BHTU,
        output_keep_BTD=draws.output_keep_BTD,
    )
    if isinstance(moe, SoftMoE):
        return x_BTD + moe(normed(x_BTD, moe_norm), mask_BT), None
    y_BTD, stats = moe(
        normed(x_BTD, moe_norm), mask_BT=mask_BT, noise_BTE=draws.noise_BTE, keep_BTKD=draws.expert_keep_BTKD
    )
    return x_BTD + y_BTD, stats


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
        randomness: Randomness | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MoEStats | None]:
        """The block's answer and its MoE's statistics (None for Soft MoE). Randomness as in `MoE` and `Attention`.

        Raises ValueError for a tensor of another kind or shape.
        """
        sizes = checked_input("x_BTD", x_BTD, self.config.attention.model_dim)
        draws = checked_draws(randomness, self.config, sizes)
        return block_forward(x_BTD, self.attention_norm, self.attention, self.moe_norm, self.moe, mask_BT, draws)
