"""Multi-head attention, causal or not, with one scale or the other."""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.arrays import checked, checked_input, dims_of_settings
from jax_moe.attention.masks import Scope
from jax_moe.attention.products import Softmax, attend
from jax_moe.config.attention import AttentionConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, PRNGKeyArray
from jax_moe.dropout import dropout, fold
from jax_moe.initializers import rounded, uniform
from jax_moe.parameters import parameter


class Attention(nnx.Module):
    """Self-attention. Projections have no bias, the output has one, as in makeMoE.

    Parameters: `query`, `key`, `value` [D, H, A], or one `qkv` [D, 3, H, A]; `out` [H, A, D], `out_bias` [D].
    """

    def __init__(
        self, config: AttentionConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
    ):
        self.config = config
        init = rounded(kernel_init or jax.nn.initializers.lecun_normal())
        D, H, A = config.model_dim, config.num_heads, config.head_dim

        def kernel(*shape: int) -> Array:
            return init(rngs.params(), (D, D), param_dtype).reshape(shape)

        if config.projections == "per_head":
            self.query, self.key, self.value = (parameter(kernel(D, H, A), "D H A", "attention") for _ in range(3))
        else:
            self.qkv = parameter(jnp.stack([kernel(D, H, A) for _ in range(3)], axis=1), "D 3 H A", "attention")
        self.out = parameter(kernel(H, A, D), "H A D", "attention")
        self.out_bias = parameter(uniform(D**-0.5)(rngs.params(), (D,), param_dtype), "D", "attention")

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        attention_keep_BHTU: Bool[Array, "B H T U"] | None = None,
        output_keep_BTD: Bool[Array, "B T D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The answer in the input's dtype; attention has no statistics.

        Dropout only with a key in training, or with masks (True where a value survives). Padding (mask_BT False) is not
        attended to. Raises ValueError for an array of another kind or shape.
        """
        x_BTD, sizes = checked_input("x_BTD", x_BTD, self.config.model_dim)
        sizes |= {"U": sizes["T"], **dims_of_settings(self.config, H="num_heads")}
        given = checked(
            sizes, mask_BT=mask_BT, attention_keep_BHTU=attention_keep_BHTU, output_keep_BTD=output_keep_BTD
        )
        dtype, rate, key = x_BTD.dtype, self.config.dropout, key if training else None
        if self.config.projections == "per_head":
            kernel_D3HA = jnp.stack([self.query[...], self.key[...], self.value[...]], axis=1)
        else:
            kernel_D3HA = self.qkv[...]
        q, k, v = jnp.einsum("BTD,DPHA->PBTHA", x_BTD, kernel_D3HA.astype(dtype))
        scope = Scope(jnp.arange(x_BTD.shape[1]), x_BTD.shape[1], given.get("mask_BT"), causal=self.config.causal)
        keep_BHTU = given.get("attention_keep_BHTU")
        softmax = Softmax(self.config.score_scale, rate=rate, key=fold(key, 0), keep_BHTU=keep_BHTU)
        heads_BTHA = attend(q, k, v, scope, softmax)
        y_BTD = jnp.einsum("BTHA,HAD->BTD", heads_BTHA, self.out[...].astype(dtype)) + self.out_bias[...].astype(dtype)
        return dropout(y_BTD, rate, fold(key, 1), given.get("output_keep_BTD"))
