"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); its cache keeps compressed vectors.

A whole call expands them to keys and values. A step of generation does not: the map to keys is applied to the query
instead, and that to values to what was found ("absorbed"), so that its cost per cached token does not grow with the
heads' widths.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.attention.masks import Scope
from jax_moe.attention.positions import Positions, growth
from jax_moe.attention.products import Softmax, attend
from jax_moe.attention.rope import rotate, rotations
from jax_moe.config.latent import LatentAttentionConfig
from jax_moe.dims import Array, DTypeLike, Float, PRNGKeyArray
from jax_moe.initializers import rounded
from jax_moe.norms import RMSNorm
from jax_moe.parameters import parameter


class Shared(NamedTuple):
    """What all layers have in common in a call."""

    turns: tuple[Array, Array] | None  # cos and sin [B, T, P]; None: nothing turns
    growth_BT: Float[Array, "B T"] | None  # the factor of the queries; None: 1


class LatentAttention(nnx.Module):
    """Self-attention of H heads over compressed keys and values.

    Parameters: `down` [D, Z + P] to the compressed vector and the rotated key, `latent_norm` [Z], `up` [Z, H, X + M] to
    keys and values, `out` [H, M, D]; `query` [D, H, A], or `query_down` [D, Q], `query_norm` [Q] and `query_up`
    [Q, H, A]; by contract `down_bias`, `query_down_bias`, `out_bias`. A = X + P.
    """

    query: nnx.Param
    query_down: nnx.Param
    query_up: nnx.Param
    down: nnx.Param
    up: nnx.Param
    out: nnx.Param

    def __init__(
        self, config: LatentAttentionConfig, *, rngs: nnx.Rngs, kernel_init: nnx.Initializer,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, kernel_init = config, rounded(kernel_init)
        D, H, A, M, Z, Q = (
            config.model_dim, config.num_heads, config.head_dim, config.value_dim, config.rank, config.query_rank
        )
        kernels: dict[str, tuple[str, tuple[int, ...]]] = {"query": ("D H A", (D, H, A))}
        biases: dict[str, tuple[str, int]] = {"down_bias": ("O", Z + config.rope_dim), "out_bias": ("D", D)}
        if Q is not None:
            kernels = {"query_down": ("D Q", (D, Q)), "query_up": ("Q H A", (Q, H, A))}
            biases |= {"query_down_bias": ("Q", Q)}
            self.query_norm = RMSNorm(Q, config.norm_eps, param_dtype, "Q")
        kernels |= {
            "down": ("D O", (D, Z + config.rope_dim)), "up": ("Z H O", (Z, H, config.plain_dim + M)),
            "out": ("H M D", (H, M, D)),
        }
        for name, (dims, shape) in kernels.items():
            setattr(self, name, parameter(kernel_init(rngs.params(), shape, param_dtype), dims, "attention"))
        for name, (dims, width) in biases.items() if config.bias else ():
            setattr(self, name, parameter(jnp.zeros((width,), param_dtype), dims, "attention"))
        self.latent_norm = RMSNorm(Z, config.norm_eps, param_dtype, "Z")

    @staticmethod
    def shared(config: LatentAttentionConfig, positions: Positions, dtype: Any) -> Shared:
        """cos and sin of the positions, and how much their queries grow."""
        rope, growth_BT = config.rope, None
        if rope is None:
            return Shared(None, None)
        if config.temperature:
            assert rope.original_max_positions is not None
            step = rope.original_max_positions
            growth_BT = growth(positions.position_BT, config.temperature, step, dtype).astype(dtype)
        turns = rotations(
            positions.position_BT, rope, config.rope_dim, jnp.dtype(dtype), positions.text_length, positions.num_slots
        )
        return Shared(turns, growth_BT)

    @staticmethod
    def empty_cache(
        config: LatentAttentionConfig, num_layers: int, batch_size: int, num_slots: int, dtype: Any
    ) -> Float[Array, "L B U O"]:
        """Zeros: for every slot the compressed vector, then the rotated key."""
        return jnp.zeros((num_layers, batch_size, num_slots, config.rank + config.rope_dim), dtype)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Positions,
        shared: Shared,
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        memory: tuple[Array, Any] | None = None,
    ) -> tuple[Float[Array, "B T D"], Array | None]:
        """The answer in the input's dtype, and the cache with these positions' compressed vectors in it.

        Scores are in the input's dtype, their softmax in fp32 or wider. Dropout only with a key in training.
        """
        q_BTHA, latent_BUO = self.queries(x_BTD, shared), self.compress(x_BTD, shared)
        scope, cache = positions.scope(None), None
        if memory is not None:
            cache, layer = memory
            place = [jnp.asarray(index, jnp.int32) for index in (layer, 0, positions.slot_T[0], 0)]
            cache = jax.lax.dynamic_update_slice(cache, latent_BUO[None], place)
        key = key if training else None
        if cache is None or positions.whole:
            heads_BTHM = self.expanded(q_BTHA, latent_BUO, scope, key)
        else:
            latent_BUO = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
            heads_BTHM = self.absorbed(q_BTHA, latent_BUO, scope, key)
        y_BTD = jnp.einsum("BTHM,HMD->BTD", heads_BTHM, self.out[...].astype(x_BTD.dtype))
        return self._biased(y_BTD, "out_bias"), cache

    def queries(self, x_BTD: Float[Array, "B T D"], shared: Shared) -> Float[Array, "B T H A"]:
        """The queries, their last P entries turned."""
        config, dtype = self.config, x_BTD.dtype
        if config.query_rank is None:
            q_BTHA = jnp.einsum("BTD,DHA->BTHA", x_BTD, self.query[...].astype(dtype))
        else:
            down_BTQ = self._biased(x_BTD @ self.query_down[...].astype(dtype), "query_down_bias")
            q_BTHA = jnp.einsum("BTQ,QHA->BTHA", self.query_norm(down_BTQ), self.query_up[...].astype(dtype))
        q_BTHX, q_BTHP = jnp.split(q_BTHA, [config.plain_dim], axis=-1)
        q_BTHA = jnp.concatenate([q_BTHX, self._turned(q_BTHP, shared)], axis=-1)
        return q_BTHA if shared.growth_BT is None else q_BTHA * shared.growth_BT[..., None, None]

    def compress(self, x_BTD: Float[Array, "B T D"], shared: Shared) -> Float[Array, "B T O"]:
        """What the cache keeps of these positions: the normed compressed vector [Z], then the turned key [P]."""
        down_BTO = self._biased(x_BTD @ self.down[...].astype(x_BTD.dtype), "down_bias")
        latent_BTZ, key_BTP = jnp.split(down_BTO, [self.config.rank], axis=-1)
        key_BTP = self._turned(key_BTP[:, :, None], shared)[:, :, 0]
        return jnp.concatenate([self.latent_norm(latent_BTZ), key_BTP], axis=-1)

    def expanded(
        self, q_BTHA: Float[Array, "B T H A"], latent_BUO: Float[Array, "B U O"], scope: Scope,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T H M"]:
        """What the queries find among keys and values of every head, as it is written in the paper."""
        latent_BUZ, key_BUP = jnp.split(latent_BUO, [self.config.rank], axis=-1)
        both_BUHO = jnp.einsum("BUZ,ZHO->BUHO", latent_BUZ, self.up[...].astype(q_BTHA.dtype))
        k_BUHX, v_BUHM = jnp.split(both_BUHO, [self.config.plain_dim], axis=-1)
        shared_BUHP = jnp.broadcast_to(key_BUP[:, :, None], (*k_BUHX.shape[:3], key_BUP.shape[-1]))
        k_BUHA = jnp.concatenate([k_BUHX, shared_BUHP], axis=-1)
        return attend(q_BTHA, k_BUHA, v_BUHM, scope, self._softmax(key))

    def absorbed(
        self, q_BTHA: Float[Array, "B T H A"], latent_BUO: Float[Array, "B U O"], scope: Scope,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T H M"]:
        """The same among the compressed vectors, all heads alike: q.(c up) = (q up^T).c, and (w c) up for w (c up)."""
        config = self.config
        up_ZHX, up_ZHM = jnp.split(self.up[...].astype(q_BTHA.dtype), [config.plain_dim], axis=-1)
        q_BTHX, q_BTHP = jnp.split(q_BTHA, [config.plain_dim], axis=-1)
        q_BTHO = jnp.concatenate([jnp.einsum("BTHX,ZHX->BTHZ", q_BTHX, up_ZHX), q_BTHP], axis=-1)
        k_BU1O = latent_BUO[:, :, None]
        found_BTHZ = attend(q_BTHO, k_BU1O, k_BU1O[..., : config.rank], scope, self._softmax(key))
        return jnp.einsum("BTHZ,ZHM->BTHM", found_BTHZ, up_ZHM)

    def _softmax(self, key: PRNGKeyArray | None) -> Softmax:
        return Softmax(self.config.score_scale, rate=self.config.dropout, key=key)

    def _turned(self, x_BTHP: Array, shared: Shared) -> Array:
        rope = self.config.rope
        return x_BTHP if rope is None or shared.turns is None else rotate(x_BTHP, *shared.turns, rope.pairs)

    def _biased(self, y: Array, name: str) -> Array:
        return y + getattr(self, name)[...].astype(y.dtype) if self.config.bias else y
