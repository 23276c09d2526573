"""The gated delta net (arXiv 2412.06464, eq. 10): a state of constant size in place of cached keys and values.

Of every value head the state S [A, M] maps keys to values. A token lets it forget, then corrects what its key finds:
S <- exp(decay) S;  S <- S + k (beta (v - k S));  its answer is q S. `stepwise` does it token by token; `chunked` does
the same for a chunk of tokens at once: the corrections of a chunk solve a triangular system (section 3.3 there).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.activations import activate
from jax_moe.attention.positions import Positions
from jax_moe.config.linear import LinearAttentionConfig
from jax_moe.dims import Array, DTypeLike, Float, PRNGKeyArray, wide
from jax_moe.initializers import rounded
from jax_moe.norms import RMSNorm
from jax_moe.parameters import parameter

CHUNK = 64  # tokens, as in the reference; the answer does not depend on it
UNIT_EPS = 1e-6  # under the root, where queries and keys get unit length


class Delta(NamedTuple):
    """What the tokens do to the states, in fp32 or wider."""

    q_BTJA: Float[Array, "B T J A"]  # of unit length over sqrt(A)
    k_BTJA: Float[Array, "B T J A"]  # of unit length
    v_BTJGM: Float[Array, "B T J G M"]
    decay_BTJG: Float[Array, "B T J G"]  # at most 0: the state is multiplied by exp(decay)
    beta_BTJG: Float[Array, "B T J G"]  # 0 to 1: the share of the error that is corrected


class Memory(NamedTuple):
    """What the layers remember of all tokens before."""

    state_LBJGAM: Float[Array, "L B J G A M"]  # fp32 or wider
    before_LBCO: Float[Array, "L B c O"]  # the convolution's last inputs, one less than it has taps


State = Float[Array, "B J G A M"]
Answer = tuple[Float[Array, "B T J G M"], State]


def stepwise(delta: Delta, state_BJGAM: State) -> Answer:
    """What each token finds, and the state after the last: token by token."""

    def step(state_BJGAM: Array, token: Delta) -> tuple[Array, Array]:
        q_BJA, k_BJA, v_BJGM, decay_BJG, beta_BJG = token
        state_BJGAM = state_BJGAM * jnp.exp(decay_BJG)[..., None, None]
        error_BJGM = v_BJGM - jnp.einsum("BJA,BJGAM->BJGM", k_BJA, state_BJGAM)
        state_BJGAM += jnp.einsum("BJA,BJGM->BJGAM", k_BJA, error_BJGM * beta_BJG[..., None])
        return state_BJGAM, jnp.einsum("BJA,BJGAM->BJGM", q_BJA, state_BJGAM)

    state_BJGAM, y_TBJGM = jax.lax.scan(step, state_BJGAM, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), delta))
    return jnp.moveaxis(y_TBJGM, 0, 1), state_BJGAM


def chunked(delta: Delta, state_BJGAM: State, chunk: int = CHUNK) -> Answer:
    """The same, `chunk` tokens at once: a scan over chunks, whose last is filled up with tokens that change nothing."""
    B, T = delta.q_BTJA.shape[:2]
    chunk = min(chunk, T)
    count = -(-T // chunk)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * chunk - T), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, count, chunk, *x.shape[2:]), 1, 0)

    state_BJGAM, y = jax.lax.scan(_chunk, state_BJGAM, jax.tree.map(chunks, delta))
    return jnp.moveaxis(y, 0, 1).reshape(B, count * chunk, *y.shape[3:])[:, :T], state_BJGAM


def _chunk(state_BJGAM: Array, delta: Delta) -> tuple[Array, Array]:
    """The state after a chunk, and what its tokens find: in the state before it, and among each other's corrections.

    Decays are summed from the chunk's first token; between two tokens they are the difference of the sums.
    """
    q_BTJA, k_BTJA, v_BTJGM, decay_BTJG, beta_BTJG = delta
    sum_BJGT = jnp.moveaxis(jnp.cumsum(decay_BTJG, axis=1), 1, -1)
    beta_BJGT = jnp.moveaxis(beta_BTJG, 1, -1)
    causal_TU = jnp.tri(q_BTJA.shape[1], dtype=bool)
    # what is not causal would overflow, so it is hidden before exp
    between_BJGTU = jnp.where(causal_TU, sum_BJGT[..., :, None] - sum_BJGT[..., None, :], -jnp.inf)
    kept_BJGTU, kept_BJGT = jnp.exp(between_BJGTU), jnp.exp(sum_BJGT)
    found_BJGTM = jnp.einsum("BTJA,BJGAM->BJGTM", k_BTJA, state_BJGAM) * kept_BJGT[..., None]
    error_BJGTM = (jnp.einsum("BTJGM->BJGTM", v_BTJGM) - found_BJGTM) * beta_BJGT[..., None]
    keys_BJTU = jnp.einsum("BTJA,BUJA->BJTU", k_BTJA, k_BTJA)
    system_BJGTU = keys_BJTU[:, :, None] * kept_BJGTU * beta_BJGT[..., None]
    new_BJGUM = jax.lax.linalg.triangular_solve(
        system_BJGTU, error_BJGTM, left_side=True, lower=True, unit_diagonal=True
    )
    scores_BJGTU = jnp.einsum("BTJA,BUJA->BJTU", q_BTJA, k_BTJA)[:, :, None] * kept_BJGTU
    y_BTJGM = jnp.einsum("BTJA,BJGAM,BJGT->BTJGM", q_BTJA, state_BJGAM, kept_BJGT)
    y_BTJGM += jnp.einsum("BJGTU,BJGUM->BTJGM", scores_BJGTU, new_BJGUM)
    until_end_BJGU = jnp.exp(sum_BJGT[..., -1:] - sum_BJGT)
    state_BJGAM = state_BJGAM * kept_BJGT[..., -1, None, None]
    return state_BJGAM + jnp.einsum("BUJA,BJGU,BJGUM->BJGAM", k_BTJA, until_end_BJGU, new_BJGUM), y_BTJGM


def convolve(x_BTO: Float[Array, "B T O"], before_BCO: Float[Array, "B c O"], taps_OC: Float[Array, "O C"]) -> Array:
    """The sum of a token's and the C - 1 tokens' before it, each times its tap of that channel; the last is its own."""
    all_BTO, T = jnp.concatenate([before_BCO, x_BTO], axis=1), x_BTO.shape[1]
    return sum(all_BTO[:, c : c + T] * taps_OC[:, c] for c in range(taps_OC.shape[1]))  # type: ignore[return-value]


def unit(x: Float[Array, "*any A"]) -> Float[Array, "*any A"]:
    """x over its length."""
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + UNIT_EPS)


class LinearAttention(nnx.Module):
    """The gated delta net of J key heads, each of which serves G value heads; O = G M.

    Parameters: `query` and `key` [D, J, A], `value` and `gate` [D, J, O], `beta` and `decay` [D, J, G]; `query_taps`,
    `key_taps` [J, A, C] and `value_taps` [J, O, C] of the convolution; `decay_log` and `decay_bias` [J, G];
    `out_norm` [M]; `out` [J, O, D].
    """

    def __init__(
        self, config: LinearAttentionConfig, *, rngs: nnx.Rngs, kernel_init: nnx.Initializer,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, kernel_init = config, rounded(kernel_init)
        D, J, G, A, M = config.model_dim, config.num_key_heads, config.served, config.key_dim, config.value_dim
        O, C = G * M, config.taps  # noqa: E741

        def made(dims: str, *shape: int) -> nnx.Param:
            return parameter(kernel_init(rngs.params(), shape, param_dtype), dims, "attention")

        self.query, self.key = made("D J A", D, J, A), made("D J A", D, J, A)
        self.value, self.gate = made("D J O", D, J, O), made("D J O", D, J, O)
        self.beta, self.decay = made("D J G", D, J, G), made("D J G", D, J, G)
        self.query_taps, self.key_taps = made("J A C", J, A, C), made("J A C", J, A, C)
        self.value_taps, self.out = made("J O C", J, O, C), made("J O D", J, O, D)
        # as the reference draws them: exp(decay_log) uniform up to 16
        drawn = jax.random.uniform(rngs.params(), (J, G), wide(param_dtype), 0.01, 16.0)
        self.decay_log = parameter(jnp.log(drawn).astype(param_dtype), "J G", "attention")
        self.decay_bias = parameter(jnp.ones((J, G), param_dtype), "J G", "attention")
        self.out_norm = RMSNorm(M, config.norm_eps, param_dtype, "M")

    @staticmethod
    def shared(config: LinearAttentionConfig, positions: Positions, dtype: Any) -> None:
        """Layers have nothing in common but the mask."""

    @staticmethod
    def empty_cache(
        config: LinearAttentionConfig, num_layers: int, batch_size: int, num_slots: int, dtype: Any
    ) -> Memory:
        """Zeros, however many slots there are."""
        J, G, A, M = config.num_key_heads, config.served, config.key_dim, config.value_dim
        channels = J * (2 * A + G * M)
        return Memory(
            jnp.zeros((num_layers, batch_size, J, G, A, M), wide(dtype)),
            jnp.zeros((num_layers, batch_size, config.taps - 1, channels), dtype),
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Positions,
        shared: None = None,
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        memory: tuple[Memory, Any] | None = None,
    ) -> tuple[Float[Array, "B T D"], Memory | None]:
        """The answer in the input's dtype, and the cache with the state after these tokens.

        Padding is a token of zeros, as in the reference: it corrects nothing, though after a text's first token it lets
        the state forget. Any text begins with the call, or where the cache ends.
        """
        dtype = x_BTD.dtype
        if positions.mask_BT is not None and x_BTD.shape[1] > 1:  # the reference's one token is never padding
            x_BTD = jnp.where(positions.mask_BT[..., None], x_BTD, 0)
        if memory is None:
            cache, layer = self.empty_cache(self.config, 1, x_BTD.shape[0], 0, dtype), 0
        else:
            cache, layer = memory
        state_BJGAM, before_BCO = (jax.lax.dynamic_index_in_dim(each, layer, keepdims=False) for each in cache)
        delta, before_BCO = self.delta(x_BTD, before_BCO)
        y_BTJGM, state_BJGAM = (chunked if positions.whole else stepwise)(delta, state_BJGAM)
        if memory is not None:
            news = (state_BJGAM, before_BCO)
            cache = Memory(*(
                jax.lax.dynamic_update_index_in_dim(old, new, layer, 0)
                for old, new in zip(cache, news, strict=True)
            ))
        return self.answer(x_BTD, y_BTJGM.astype(dtype)), None if memory is None else cache

    def delta(self, x_BTD: Float[Array, "B T D"], before_BCO: Float[Array, "B c O"]) -> tuple[Delta, Array]:
        """What these tokens do, and the convolution's last inputs."""
        config, dtype = self.config, x_BTD.dtype
        B, T, _ = x_BTD.shape
        J, G, A, M = config.num_key_heads, config.served, config.key_dim, config.value_dim
        mapped = [jax.lax.collapse(self._project(x_BTD, name), 2) for name in ("query", "key", "value")]
        mixed_BTO = jnp.concatenate(mapped, axis=-1)
        named = (self.query_taps, self.key_taps, self.value_taps)
        taps_OC = jnp.concatenate([taps[...].reshape(-1, config.taps) for taps in named]).astype(dtype)
        turned_BTO = activate(config.activation, convolve(mixed_BTO, before_BCO, taps_OC)).astype(wide(dtype))
        q_BTO, k_BTO, v_BTO = jnp.split(turned_BTO, [J * A, 2 * J * A], axis=-1)
        rate_JG, bias_JG = (each[...].astype(wide(dtype)) for each in (self.decay_log, self.decay_bias))
        inner_BTJG = self._project(x_BTD, "decay").astype(wide(dtype)) + bias_JG
        # torch's softplus(x) is x above 20, which is 2e-9 less
        decay_BTJG = -jnp.exp(rate_JG) * jax.nn.softplus(inner_BTJG)
        beta_BTJG = jax.nn.sigmoid(self._project(x_BTD, "beta")).astype(wide(dtype))
        q_BTJA, k_BTJA = (unit(y_BTO.reshape(B, T, J, A)) for y_BTO in (q_BTO, k_BTO))
        found = Delta(q_BTJA * A**-0.5, k_BTJA, v_BTO.reshape(B, T, J, G, M), decay_BTJG, beta_BTJG)
        last_BTO = jnp.concatenate([before_BCO, mixed_BTO], axis=1)
        return found, last_BTO[:, last_BTO.shape[1] - (config.taps - 1) :]

    def answer(self, x_BTD: Float[Array, "B T D"], y_BTJGM: Float[Array, "B T J G M"]) -> Float[Array, "B T D"]:
        """What the heads found, normed, gated and mapped to the model's width."""
        dtype, (B, T, J, G, M) = x_BTD.dtype, y_BTJGM.shape
        gate_BTJGM = self._project(x_BTD, "gate").reshape(B, T, J, G, M).astype(wide(dtype))
        gated_BTJGM = (self.out_norm(y_BTJGM) * jax.nn.silu(gate_BTJGM)).astype(dtype)
        return jnp.einsum("BTJO,JOD->BTD", gated_BTJGM.reshape(B, T, J, G * M), self.out[...].astype(dtype))

    def _project(self, x_BTD: Array, name: str) -> Array:
        """A map of the input to every key head's entries of that kind."""
        return jnp.einsum("BTD,DJO->BTJO", x_BTD, getattr(self, name)[...].astype(x_BTD.dtype))
