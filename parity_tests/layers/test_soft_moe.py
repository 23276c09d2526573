"""Soft MoE: padding, order and shapes. Its answers are worked by hand in `test_pencil.py`."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import AttentionConfig, SoftMoE, SoftMoEConfig
from jax_moe.config.models import BlockConfig
from jax_moe.models.block import Block
from parity_tests.shared.filled import filled

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = SoftMoEConfig(model_dim=6, num_experts=3, num_slots=2, hidden_dims=(6, 5))
MASK = np.asarray([[True, True, False, True, False], [True, True, True, True, True], [False] * 5])


@pytest.fixture(autouse=True, scope="module")
def fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def soft(config: SoftMoEConfig = CONFIG) -> SoftMoE:
    return filled(lambda: SoftMoE(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float64")))


@pytest.fixture(scope="module")
def layer() -> SoftMoE:
    return soft()


def inputs(seed: int = 0, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape or (3, 5, 6)))


def phi_gradient(
    layer: SoftMoE, x: jax.Array, mask: np.ndarray | None, real: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the sum of the real tokens' squared answers by phi and by the input."""

    def loss(phi: jax.Array, x: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(layer)
        state["phi"] = state["phi"].replace(phi)
        y = nnx.merge(graphdef, state)(x, None if mask is None else jnp.asarray(mask))
        return (jnp.where(jnp.asarray(real)[..., None], y, 0) ** 2).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(layer.phi[...], x)


def test_a_row_of_nothing_but_padding_is_finite(layer: SoftMoE) -> None:
    y = layer(inputs(), jnp.asarray(MASK))
    assert np.isfinite(y).all()
    for gradient in phi_gradient(layer, inputs(), MASK, np.ones_like(MASK)):
        assert np.isfinite(gradient).all()


def test_padding_does_not_reach_the_others(layer: SoftMoE) -> None:
    x = inputs()
    other = jnp.where(jnp.asarray(MASK)[..., None], x, 1e6 * inputs(1))
    one, two = (np.asarray(layer(one, jnp.asarray(MASK))) for one in (x, other))
    np.testing.assert_array_equal(one[MASK], two[MASK])  # bit for bit
    assert not np.array_equal(np.asarray(layer(x))[MASK], one[MASK]), "without the mask it does"


def test_masked_is_as_if_it_were_not_there(layer: SoftMoE) -> None:
    x, real = inputs()[:1], MASK[:1]
    short = x[:, real[0]]
    np.testing.assert_allclose(layer(x, jnp.asarray(real))[:, real[0]], layer(short), rtol=0, atol=1e-15)
    phi_masked, x_masked = phi_gradient(layer, x, real, real)
    phi_short, x_short = phi_gradient(layer, short, None, np.ones((1, 3), bool))
    for masked, gone in ((phi_masked, phi_short), (x_masked[:, real[0]], x_short)):
        top = np.abs(gone).max()
        assert top > 1e-6
        np.testing.assert_allclose(masked, gone, rtol=0, atol=1e-14 * top)
    np.testing.assert_array_equal(x_masked[:, ~real[0]], 0)


def test_tokens_in_another_order_get_the_same_answers(layer: SoftMoE) -> None:
    order = np.asarray([3, 0, 4, 1, 2])
    x = inputs()
    np.testing.assert_allclose(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-14)


def test_one_slot_and_one_token() -> None:
    # one token: every slot reads it alone; one expert, one slot: the token reads that slot alone
    single = soft(SoftMoEConfig(model_dim=6, num_experts=1, num_slots=1, hidden_dims=(), residual=True))
    x = inputs(0, 2, 1, 6)
    kernel, bias = single.experts.last_fc.kernel[...][0], single.experts.last_fc.bias[...][0]
    np.testing.assert_allclose(single(x), x + x @ kernel + bias, rtol=0, atol=1e-15)
    # more tokens: everybody gets the same answer, since there is one slot to read
    y = np.asarray(single(inputs()))
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), rtol=0, atol=1e-15)


def test_a_causal_block_refuses_it() -> None:
    attention = AttentionConfig(model_dim=6, num_heads=2, causal=False)
    config = BlockConfig(attention=attention, moe=CONFIG)
    block = filled(lambda: Block(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float64")))
    y, stats = block(inputs()[:1])
    assert y.shape == (1, 5, 6) and stats is None
    with pytest.raises(ValueError, match=r"^moe='SoftMoEConfig': must be a MoEConfig in a causal block"):
        BlockConfig(attention=AttentionConfig(model_dim=6, num_heads=2), moe=CONFIG)


def test_another_width_is_refused(layer: SoftMoE) -> None:
    with pytest.raises(ValueError, match=r"^x_BTD has width 7: must be model_dim=6$"):
        layer(jnp.zeros((1, 5, 7)))


PUBLISHED = [
    {"output_activation": "relu", "output_layer_norm": True, "residual": False},
    {"output_activation": "identity", "residual": True},
]


@pytest.mark.parametrize("published", PUBLISHED, ids=str)
def test_both_published_settings(published: dict) -> None:
    y = soft(SoftMoEConfig(model_dim=6, num_experts=3, num_slots=2, **published))(inputs())
    assert np.isfinite(y).all() and np.asarray(y).std() > 1e-3
    if published["output_activation"] == "relu":
        assert (np.asarray(y) >= 0).all(), "a mix of answers that are not negative"
