"""The transformer block: attention and a mixture of experts, each behind a norm and inside a residual."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jax_moe.arrays import checked, checked_input, dims_of_settings
from jax_moe.attention.multihead import Attention
from jax_moe.config.checks import require
from jax_moe.config.models import BlockConfig
from jax_moe.config.moe import SoftMoEConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray
from jax_moe.dropout import fold
from jax_moe.losses import MoEStats
from jax_moe.moe import MoE, MoEOutput
from jax_moe.norms import layer_norm
from jax_moe.shapes import Dim, Sizes
from jax_moe.soft_moe import SoftMoE


class Randomness(NamedTuple):
    """Draws given as arrays in place of a key; a stack of blocks takes each with a leading L. None: not drawn."""

    noise_BTE: Float[Array, "*L B T E"] | None = None  # unit Gaussians for the router
    attention_keep_BHTU: Bool[Array, "*L B H T U"] | None = None  # True where dropout lets a value through
    output_keep_BTD: Bool[Array, "*L B T D"] | None = None
    expert_keep_BTKD: Bool[Array, "*L B T K D"] | None = None


def checked_draws(
    draws: Randomness | None, config: BlockConfig, sizes: Sizes, leading: str = ""
) -> Randomness:
    """The draws, each of its kind and shape, `leading` dims first. Raises ValueError for others, and for draws of no
    use.
    """
    draws = draws or Randomness()
    sizes = {**sizes, "U": sizes["T"], "D": Dim(config.attention.model_dim, "model_dim")}
    sizes |= dims_of_settings(config.attention, H="num_heads")
    if isinstance(config.moe, SoftMoEConfig):
        for name in ("noise_BTE", "expert_keep_BTKD"):
            require(getattr(draws, name) is None, name, "an array", "left out: Soft MoE draws nothing")
    else:
        sizes |= dims_of_settings(config.moe, E="num_experts", K="top_k")
    return Randomness(**checked(sizes, leading, **draws._asdict()))


class BlockOutput(NamedTuple):
    """What one call of a block computes."""

    y_BTD: Float[Array, "B T D"]
    moe: MoEOutput | None = None  # None for Soft MoE
    stages: dict[str, Array] | None = None  # every intermediate value by name, where asked for


class Block(nnx.Module):
    """x += attention(norm(x)); x += moe(norm(x)). `moe` is sparse or, where nothing is causal, soft."""

    def __init__(
        self, config: BlockConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
    ):
        self.config = config
        kwargs: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.attention_norm = layer_norm(config.attention.model_dim, rngs, param_dtype, config.norm_eps)
        self.attention = Attention(config.attention, kernel_init=kernel_init, **kwargs)
        self.moe_norm = layer_norm(config.attention.model_dim, rngs, param_dtype, config.norm_eps)
        if isinstance(config.moe, SoftMoEConfig):
            self.moe: SoftMoE | MoE = SoftMoE(config.moe, **kwargs)
        else:
            self.moe = MoE(config.moe, kernel_init=kernel_init, **kwargs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        randomness: Randomness | None = None,
        capacity_limit: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEStats | None]:
        """The block's answer and its MoE's statistics (None for Soft MoE). Randomness as in `MoE` and `Attention`.

        Raises ValueError for an array of another kind or shape.
        """
        output = self.run(
            x_BTD, key=key, training=training, mask_BT=mask_BT, randomness=randomness, capacity_limit=capacity_limit
        )
        return output.y_BTD, None if output.moe is None else output.moe.stats

    def run(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        randomness: Randomness | None = None,
        watch: bool = False,
        **arrays: Array | None,
    ) -> BlockOutput:
        """All that a call computes. Arguments as in a call and, as in `MoE`, `expert_BTK`; `watch` also hands out
        every stage.
        """
        x_BTD, sizes = checked_input("x_BTD", x_BTD, self.config.attention.model_dim)
        draws = checked_draws(randomness, self.config, sizes)
        normed_BTD = self.attention_norm(x_BTD).astype(x_BTD.dtype)
        attended_BTD = self.attention(
            normed_BTD, key=fold(key, 0) if training else None, mask_BT=mask_BT,
            attention_keep_BHTU=draws.attention_keep_BHTU, output_keep_BTD=draws.output_keep_BTD,
        )
        x_BTD += attended_BTD
        ffn_BTD = self.moe_norm(x_BTD).astype(x_BTD.dtype)
        if isinstance(self.moe, SoftMoE):
            return BlockOutput(x_BTD + self.moe(ffn_BTD, mask_BT))
        output = self.moe.run(
            ffn_BTD, key=fold(key, 1), training=training, mask_BT=mask_BT, noise_BTE=draws.noise_BTE,
            keep_BTKD=draws.expert_keep_BTKD, watch=watch, **arrays,
        )
        y_BTD = x_BTD + output.y_BTD
        own = {"attention_norm": normed_BTD, "attention": attended_BTD, "ffn_norm": ffn_BTD, "residual": y_BTD}
        return BlockOutput(y_BTD, output, None if output.stages is None else {**output.stages, **own})
