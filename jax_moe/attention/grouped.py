"""Grouped-query attention with rotary positions, as the Hugging Face decoders have it; its cache keeps keys and
values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.activations import clamp_above
from jax_moe.attention.masks import Scope
from jax_moe.attention.positions import Positions, growth
from jax_moe.attention.products import Softmax, attend
from jax_moe.attention.rope import rotate, rotations
from jax_moe.config.attention import GroupedAttentionConfig
from jax_moe.dims import Array, DTypeLike, Float, PRNGKeyArray
from jax_moe.initializers import rounded
from jax_moe.norms import RMSNorm, rms_norm
from jax_moe.parameters import parameter

Heads = tuple[Array, Array, Array]


class Shared(NamedTuple):
    """What all layers of one contract have in common in a call."""

    turns: tuple[Array, Array] | None  # cos and sin [B, T, A]; None: nothing turns
    growth_BT: Float[Array, "B T"] | None = None  # the factor of the queries, in fp32 or wider; None: 1


class KeysAndValues(NamedTuple):
    """What the layers remember of every slot, in the weights' dtype."""

    key_LBUJA: Float[Array, "L B U J A"]
    value_LBUJA: Float[Array, "L B U J A"]


class GroupedAttention(nnx.Module):
    """Self-attention of H query heads over J key/value heads.

    Parameters `query` [D, H, A], `key` and `value` [D, J, A] (no `value` where values are the keys), `out` [H, A, D];
    by contract `*_bias`, `sinks` [H], `gate` [D, H, A], `query_norm`, `key_norm`.
    """

    def __init__(
        self, config: GroupedAttentionConfig, *, rngs: nnx.Rngs, kernel_init: nnx.Initializer,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, kernel_init = config, rounded(kernel_init)
        D, H, J, A = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
        projected = (("query", H, "H"), ("key", J, "J"), ("value", J, "J"))
        for name, heads, letter in projected[:2] if config.value_from_key else projected:
            kernel = kernel_init(rngs.params(), (D, heads, A), param_dtype)
            setattr(self, name, parameter(kernel, f"D {letter} A", "attention"))
            if config.qkv_bias:
                setattr(self, f"{name}_bias", parameter(jnp.zeros((heads, A), param_dtype), f"{letter} A", "attention"))
        self.out = parameter(kernel_init(rngs.params(), (H, A, D), param_dtype), "H A D", "attention")
        if config.output_bias:
            self.out_bias = parameter(jnp.zeros((D,), param_dtype), "D", "attention")
        if config.output_gate:
            self.gate = parameter(kernel_init(rngs.params(), (D, H, A), param_dtype), "D H A", "attention")
            if config.qkv_bias:
                self.gate_bias = parameter(jnp.zeros((H, A), param_dtype), "H A", "attention")
        if config.sinks:
            self.sinks = parameter(jnp.zeros((H,), param_dtype), "H", "attention")
        if config.qk_norm != "none" and config.qk_norm_scale:
            widths = (A, A) if config.qk_norm == "per_head" else (H * A, J * A)
            kwargs: dict[str, Any] = {"dim": "W", "kind": config.qk_norm_kind}
            self.query_norm, self.key_norm = (RMSNorm(each, config.norm_eps, param_dtype, **kwargs) for each in widths)

    @staticmethod
    def shared(config: GroupedAttentionConfig, positions: Positions, dtype: Any) -> Shared:
        """cos and sin of the positions, and how much their queries grow."""
        position_BT, turns, grown = positions.position_BT, None, None
        if config.rope is not None:
            length = positions.text_length
            turns = rotations(
                position_BT, config.rope, config.head_dim, jnp.dtype(dtype), length, positions.num_slots
            )
        if config.temperature:
            grown = growth(position_BT + 1, config.temperature, config.temperature_step, dtype)
        return Shared(turns, grown)

    @staticmethod
    def empty_cache(
        config: GroupedAttentionConfig, num_layers: int, batch_size: int, num_slots: int, dtype: Any
    ) -> KeysAndValues:
        """Zeros."""
        shape = (num_layers, batch_size, num_slots, config.num_kv_heads, config.head_dim)
        return KeysAndValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Positions,
        shared: Shared,
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        memory: tuple[KeysAndValues, Any] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysAndValues | None]:
        """The answer in the input's dtype, and the cache with these positions' keys and values in it.

        Scores are in the input's dtype, their softmax in fp32 or wider. Dropout only with a key in training.
        """
        q_BTHA, k_BUJA, v_BUJA = self.project(x_BTD, shared)
        cache = None
        if memory is not None:
            cache, layer = memory
            place = [jnp.asarray(index, jnp.int32) for index in (layer, 0, positions.slot_T[0], 0, 0)]
            news = (k_BUJA[None], v_BUJA[None])
            pairs = zip(cache, news, strict=True)
            cache = KeysAndValues(*(jax.lax.dynamic_update_slice(old, new, place) for old, new in pairs))
            if not positions.whole:
                k_BUJA, v_BUJA = (jax.lax.dynamic_index_in_dim(each, layer, keepdims=False) for each in cache)
        key = key if training else None
        scope = positions.scope(self.config.window, self.config.chunk)
        gate_BTHA = jax.nn.sigmoid(self._project(x_BTD, "gate")) if self.config.output_gate else None
        return self.attend(q_BTHA, k_BUJA, v_BUJA, scope, key, gate_BTHA), cache

    def project(self, x_BTD: Float[Array, "B T D"], shared: Shared) -> Heads:
        """Queries, keys and values of these positions, the first two turned and normed."""
        config = self.config
        q_BTHA, k_BTJA = (self._project(x_BTD, name) for name in ("query", "key"))
        v_BTJA = k_BTJA if config.value_from_key else self._project(x_BTD, "value")
        if config.qk_norm_place == "before_rope":
            q_BTHA, k_BTJA = self._norm(q_BTHA, "query"), self._norm(k_BTJA, "key")
        if config.value_norm:
            v_BTJA = rms_norm(v_BTJA, None, config.norm_eps)
        if config.clip_qkv is not None:
            bound = config.clip_qkv
            q_BTHA, k_BTJA, v_BTJA = (-clamp_above(-clamp_above(y, bound), bound) for y in (q_BTHA, k_BTJA, v_BTJA))
        if shared.turns is not None:
            assert config.rope is not None
            q_BTHA, k_BTJA = (rotate(y, *shared.turns, config.rope.pairs) for y in (q_BTHA, k_BTJA))
        if config.qk_norm_place == "after_rope":
            q_BTHA, k_BTJA = self._norm(q_BTHA, "query"), self._norm(k_BTJA, "key")
        if shared.growth_BT is not None:
            q_BTHA = (q_BTHA * shared.growth_BT[..., None, None]).astype(q_BTHA.dtype)
        return q_BTHA, k_BTJA, v_BTJA

    def attend(
        self,
        q_BTHA: Float[Array, "B T H A"],
        k_BUJA: Float[Array, "B U J A"],
        v_BUJA: Float[Array, "B U J A"],
        scope: Scope,
        key: PRNGKeyArray | None = None,
        gate_BTHA: Float[Array, "B T H A"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the queries find among the keys, times the gate where there is one."""
        config, dtype = self.config, q_BTHA.dtype
        sinks_H = self.sinks[...] if config.sinks else None
        softmax = Softmax(config.score_scale, sinks_H, config.dropout, key)
        heads_BTHA = attend(q_BTHA, k_BUJA, v_BUJA, scope, softmax)
        if gate_BTHA is not None:
            heads_BTHA *= gate_BTHA
        y_BTD = jnp.einsum("BTHA,HAD->BTD", heads_BTHA, self.out[...].astype(dtype))
        return y_BTD + self.out_bias[...].astype(dtype) if config.output_bias else y_BTD

    def _norm(self, y_BTHA: Array, name: str) -> Array:
        """Queries or keys normed, each head or over their full width."""
        if self.config.qk_norm == "none":
            return y_BTHA
        if not self.config.qk_norm_scale:
            return rms_norm(y_BTHA, None, self.config.norm_eps)
        norm = getattr(self, f"{name}_norm")
        B, T, H, A = y_BTHA.shape
        flat = self.config.qk_norm == "full_width"
        return norm(y_BTHA.reshape(B, T, H * A) if flat else y_BTHA).reshape(y_BTHA.shape)

    def _project(self, x_BTD: Array, name: str) -> Array:
        config, dtype = self.config, x_BTD.dtype
        y_BTHA = jnp.einsum("BTD,DHA->BTHA", x_BTD, getattr(self, name)[...].astype(dtype))
        if config.qkv_bias:
            y_BTHA += getattr(self, f"{name}_bias")[...].astype(dtype)
        return y_BTHA
