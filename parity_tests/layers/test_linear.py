"""The gated delta net: by hand, its two forms against each other, and with a cache against one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import DecoderConfig, LayerConfig, LinearAttentionConfig, presets
from jax_moe.attention import LinearAttention
from jax_moe.attention.linear import Delta, chunked, stepwise
from jax_moe.attention.positions import Positions, whole_call
from jax_moe.models.decoder import Decoder
from parity_tests.shared.compare import MismatchError, check_close

pytestmark = pytest.mark.usefixtures("quick", "small_programs")
B, J, G, A, M = 2, 2, 3, 4, 5
TOLERANCE = 2e-14  # relative, in fp64; measured: 2.3e-15


def drawn(T: int) -> tuple[Delta, np.ndarray]:
    """What T tokens do, and a state before them."""
    draw = np.random.default_rng(T)
    q, k = draw.normal(size=(2, B, T, J, A))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay, beta = -draw.exponential(size=(B, T, J, G)), draw.uniform(size=(B, T, J, G))
    return Delta(q, k, draw.normal(size=(B, T, J, G, M)), decay, beta), draw.normal(size=(B, J, G, A, M))


def test_a_token_at_a_time_by_hand() -> None:
    """Each token lets the state forget, corrects what its key finds, and asks with its query: loops in numpy."""
    with jax.enable_x64(True):
        delta, state = drawn(7)
        found, last = stepwise(Delta(*map(jnp.asarray, delta)), jnp.asarray(state))
        expected, state = np.zeros(found.shape), state.copy()
        for b, j, g in np.ndindex(B, J, G):
            S = state[b, j, g]
            for t in range(7):
                S *= np.exp(delta.decay_BTJG[b, t, j, g])
                k, v = delta.k_BTJA[b, t, j], delta.v_BTJGM[b, t, j, g]
                S += np.outer(k, delta.beta_BTJG[b, t, j, g] * (v - k @ S))
                expected[b, t, j, g] = delta.q_BTJA[b, t, j] @ S
        check_close({"y": np.asarray(found), "state": np.asarray(last)}, {"y": expected, "state": state}, TOLERANCE, "")


@pytest.mark.parametrize(("T", "chunk"), [(1, 64), (7, 3), (8, 4), (13, 64)])
def test_chunks_give_what_steps_give(T: int, chunk: int) -> None:
    """Answers, the last state, and the gradients of all that goes in; chunks that do not divide the text."""
    with jax.enable_x64(True):
        delta, state = jax.tree.map(jnp.asarray, drawn(T))
        probe = np.random.default_rng(0).normal(size=(B, T, J, G, M))

        def everything(form: object) -> dict[str, np.ndarray]:
            def loss(delta: Delta, state: jax.Array) -> tuple[jax.Array, tuple]:
                y, last = form(delta, state)  # type: ignore[operator]
                return (y * probe).sum() + (last**2).sum(), (y, last)

            (_, (y, last)), (g, g_state) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(delta, state)
            named = {"y": y, "last": last, "state": g_state, **g._asdict()}
            return {name: np.asarray(value) for name, value in named.items()}

        steps = everything(stepwise)
        check_close(everything(lambda *given: chunked(*given, chunk)), steps, TOLERANCE, "chunks")
        if chunk < T:  # the planted fault: each chunk begins with no state
            def forgets(delta: Delta, state: jax.Array) -> tuple:
                return chunked(delta, 0 * state, chunk)

            with pytest.raises(MismatchError):
                check_close(everything(forgets), steps, 1e3 * TOLERANCE, "no state before")


CONFIG = LinearAttentionConfig(
    model_dim=6, num_key_heads=J, num_value_heads=J * G, key_dim=A, value_dim=M, taps=3, norm_eps=1e-5
)


def filled() -> LinearAttention:
    """A layer in fp64."""
    layer = LinearAttention(
        CONFIG, rngs=nnx.Rngs(0), kernel_init=jax.nn.initializers.lecun_normal(), param_dtype=jnp.float64
    )
    draw = np.random.default_rng(3)
    for name in ("decay_log", "decay_bias"):
        getattr(layer, name)[...] = jnp.asarray(draw.normal(size=(J, G)))
    return layer


def test_with_a_cache_the_answer_is_that_of_one_call() -> None:
    """The first tokens at once, then one by one; padding on the left stays padding."""
    with jax.enable_x64(True):
        layer, T, first = filled(), 9, 5
        x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, 6)))
        mask = jnp.ones((B, T), bool).at[1, :2].set(False)
        position = jnp.broadcast_to(jnp.arange(T), (B, T))
        whole, _ = layer(x, whole_call(T, position, mask))
        memory = LinearAttention.empty_cache(CONFIG, 2, B, T, jnp.float64)
        assert all(part.shape[:2] == (2, B) for part in memory)
        slots = whole_call(first, position[:, :first], mask[:, :first])
        parts = []
        y, memory = layer(x[:, :first], slots, memory=(memory, 1))
        parts.append(y)
        for t in range(first, T):
            y, memory = layer(x[:, t : t + 1], Positions(position[:, t : t + 1], jnp.asarray([t]), T, mask),
                              memory=(memory, 1))
            parts.append(y)
        assert not np.asarray(memory.state_LBJGAM[0]).any() and np.asarray(memory.state_LBJGAM[1]).any()
        found = np.concatenate(parts, axis=1)
        check_close({"y": found[np.asarray(mask)]}, {"y": np.asarray(whole)[np.asarray(mask)]}, TOLERANCE, "cache")


def test_padding_on_the_left_changes_nothing_but_its_own_answers() -> None:
    with jax.enable_x64(True):
        layer = filled()
        x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, 6)))
        padded = jnp.concatenate([jnp.full((1, 3, 6), 7.0), x], axis=1)
        mask = jnp.arange(9)[None] >= 3
        alone, _ = layer(x, whole_call(6, jnp.arange(6)[None], None))
        beside, _ = layer(padded, whole_call(9, jnp.arange(9)[None], mask))
        check_close({"y": np.asarray(beside)[:, 3:]}, {"y": np.asarray(alone)}, TOLERANCE, "padding")


def test_in_a_decoder() -> None:
    """A decoder of such layers by turns with others: finite gradients for every parameter, the words of inspect."""
    moe = presets.qwen3_moe(6, 5, 4, 2)
    grouped = DecoderConfig.grouped(
        vocab_size=11, model_dim=6, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, moe=moe
    )
    turns = (CONFIG, grouped.layers[0].attention) * 2
    config = DecoderConfig(
        vocab_size=11, model_dim=6, layers=tuple(LayerConfig(attention=kind, ffn=moe) for kind in turns)
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jnp.arange(10).reshape(2, 5)
    gradients = jax.jit(jax.grad(lambda p: (nnx.merge(graphdef, p, rest)(tokens) ** 2).sum()))(params)
    for path, value in nnx.to_flat_state(gradients):
        assert np.isfinite(value[...]).all() and np.abs(value[...]).max() > 0, path
    assert "gated delta net" in CONFIG.words()["attention"]
    with pytest.raises(ValueError, match="num_value_heads=5: must be a multiple of num_key_heads=2"):
        LinearAttentionConfig(model_dim=6, num_key_heads=2, num_value_heads=5, key_dim=4, value_dim=5)
