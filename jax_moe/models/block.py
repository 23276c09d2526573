"""The transformer block: attention and a mixture of experts, each behind a norm and inside a residual."""

from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from flax import nnx

from jax_moe.arrays import checked_input
from jax_moe.attention.multihead import Attention
from jax_moe.config.models import BlockConfig
from jax_moe.config.moe import SoftMoEConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray
from jax_moe.dropout import fold
from jax_moe.losses import MoEStats
from jax_moe.moe import MoE, MoEArrays
from jax_moe.norms import layer_norm
from jax_moe.sharding.explicit import auto_inside
from jax_moe.soft_moe import SoftMoE


class BlockOutput(NamedTuple):
    """What one call of a block computes."""

    y_BTD: Float[Array, "B T D"]
    stats: MoEStats
    expert_BTK: Int[Array, "B T K"] | None  # the experts every token was sent to, best first; None for Soft MoE
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
        noise_BTE: Float[Array, "B T E"] | None = None,
        jitter_BTD: Float[Array, "B T D"] | None = None,
        keep_BTKD: Bool[Array, "B T K D"] | None = None,
        attention_keep_BHTU: Bool[Array, "B H T U"] | None = None,
        output_keep_BTD: Bool[Array, "B T D"] | None = None,
        expert_BTK: Int[Array, "B T K"] | None = None,
        capacity_limit: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEStats]:
        """The block's answer and its mixture's statistics. Arguments as in `MoE` and `Attention`.

        Raises ValueError for an array of another kind or shape, and for a sparse layer's if the mixture is soft.
        """
        output = self.run(
            x_BTD, key=key, training=training, mask_BT=mask_BT, attention_keep_BHTU=attention_keep_BHTU,
            output_keep_BTD=output_keep_BTD, noise_BTE=noise_BTE, jitter_BTD=jitter_BTD, keep_BTKD=keep_BTKD,
            expert_BTK=expert_BTK, capacity_limit=capacity_limit,
        )
        return output.y_BTD, output.stats

    @auto_inside("x_BTD", "y_BTD", "expert_BTK")
    def run(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        attention_keep_BHTU: Bool[Array, "B H T U"] | None = None,
        output_keep_BTD: Bool[Array, "B T D"] | None = None,
        watch: bool = False,
        **arrays: Unpack[MoEArrays],
    ) -> BlockOutput:
        """All that a call computes. Arguments as in a call; `watch` also hands out every stage."""
        x_BTD, _ = checked_input("x_BTD", x_BTD, self.config.attention.model_dim)
        used = self.config.used(**arrays)
        normed_BTD = self.attention_norm(x_BTD).astype(x_BTD.dtype)
        attended_BTD = self.attention(
            normed_BTD, key=fold(key, 0), training=training, mask_BT=mask_BT, attention_keep_BHTU=attention_keep_BHTU,
            output_keep_BTD=output_keep_BTD,
        )
        x_BTD += attended_BTD
        ffn_BTD = self.moe_norm(x_BTD).astype(x_BTD.dtype)
        output = self.moe.run(ffn_BTD, key=fold(key, 1), training=training, mask_BT=mask_BT, watch=watch, **used)
        y_BTD = x_BTD + output.y_BTD
        own = {"attention_norm": normed_BTD, "attention": attended_BTD, "ffn_norm": ffn_BTD, "residual": y_BTD}
        stages = None if output.stages is None else {**output.stages, **own}
        return BlockOutput(y_BTD, output.stats, output.expert_BTK, stages)
