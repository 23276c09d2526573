"""An expert that was not chosen gets no gradient in this step. Can it still be trained?

Its weights get a gradient of exactly zero: they learn nothing from this step, though AdamW's decay and momentum still
move them. Its row of the router gets a gradient from a softmax over all experts, but none from a softmax over the
chosen experts (makeMoE), unless the balance loss is on. Over a run every expert is chosen at some step.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_moe import MakeMoE, MakeMoEConfig, MoE, next_token_loss, presets
from jax_moe.config.moe import MoEConfig
from parity_tests.shared.filled import filled

pytestmark = pytest.mark.usefixtures("quick")
UNCHOSEN = [1, 3]  # of five experts
MAKEMOE = presets.makemoe(6, num_experts=5, capacity_factor=None)
OLMOE = presets.olmoe(6, 7, 5, 2)
MIXTRAL = presets.mixtral(6, 7, 5, 2)
X = np.random.default_rng(0).uniform(-1, 1, size=(2, 8, 6))
X[..., 0] = 1  # constant, so that its row of the router's kernel keeps two experts out ...
KERNEL = np.zeros((6, 5))
KERNEL[0, UNCHOSEN] = -2.5, -3.0
KERNEL[[1, 2, 3], [0, 2, 4]] = 1  # ... while the next three features decide among the others


@pytest.fixture(autouse=True, scope="module")
def fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def layer_of(config: MoEConfig) -> MoE:
    layer = filled(lambda: MoE(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float64")))
    layer.router.kernel[...] = jnp.asarray(KERNEL)
    return layer


def gradients(layer: MoE, balance: float = 0.0) -> dict[str, np.ndarray]:
    """Gradients of the summed squared answers plus `balance` times the balance loss, by our names."""
    graphdef, state = nnx.split(layer)

    def loss(state: nnx.State) -> tuple[jax.Array, jax.Array]:
        moe = nnx.merge(graphdef, state)
        x = jnp.asarray(X)
        y, stats = moe(x)
        return (y**2).sum() + balance * stats.load_balance_loss, stats.expert_load_E

    tree, load_E = jax.jit(jax.grad(loss, has_aux=True))(state)
    assert (np.asarray(load_E)[UNCHOSEN] == 0).all() and (np.delete(load_E, UNCHOSEN) > 0).all(), "the case is as told"
    return {".".join(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(tree)}


@pytest.mark.parametrize("dispatcher", ["einsum", "grouped", "ragged", "blocks", "chosen", "gather"])
@pytest.mark.parametrize("config", [MAKEMOE, OLMOE, MIXTRAL], ids=["makemoe", "olmoe", "mixtral"])
def test_its_own_gradient_is_exactly_zero(config: MoEConfig, dispatcher: str) -> None:
    if dispatcher == "gather":
        config = config.with_capacity(1.5)
    of = gradients(layer_of(dataclasses.replace(config, dispatcher=dispatcher)))
    experts = {name: value for name, value in of.items() if name.startswith("experts.")}
    assert len(experts) == (4 if config.expert.bias else 3)
    for name, value in experts.items():
        assert (value[UNCHOSEN] == 0).all(), name  # bitwise, not by tolerance
        others = np.delete(value, UNCHOSEN, axis=0)
        assert all(gradient.any() for gradient in others), f"{name}: those chosen do get one"


def test_the_routers_row_under_a_softmax_over_all() -> None:
    # weights are probabilities among all five: each chosen weight grows if an unchosen logit falls
    row = np.abs(gradients(layer_of(OLMOE))["router.kernel"]).max(axis=0)
    assert (row[UNCHOSEN] > 1e-4).all(), row


def test_the_routers_row_when_the_sum_is_divided_out() -> None:
    # Mixtral divides by the sum of the chosen probabilities, so the unchosen logit cancels: only rounding remains
    row = np.abs(gradients(layer_of(MIXTRAL))["router.kernel"]).max(axis=0)
    assert (row[UNCHOSEN] < 1e-14 * row.max()).all(), row


def test_the_routers_row_under_a_softmax_over_the_chosen() -> None:
    of = gradients(layer_of(MAKEMOE))
    assert (of["router.kernel"][:, UNCHOSEN] == 0).all() and (of["router.bias"][UNCHOSEN] == 0).all()  # exactly
    assert np.delete(of["router.kernel"], UNCHOSEN, axis=1).any(axis=0).all()
    assert not of["router.noise_kernel"].any(), "no noise was drawn"


def test_the_balance_loss_reaches_the_row() -> None:
    with_balance = gradients(layer_of(MAKEMOE), balance=0.01)
    assert (np.abs(with_balance["router.bias"][UNCHOSEN]) > 1e-6).all()
    # but not the expert itself
    assert (with_balance["experts.up"][UNCHOSEN] == 0).all()


def test_adamw_moves_it_all_the_same() -> None:
    optimizer = optax.adamw(0.1, weight_decay=0.01)
    weight = jnp.asarray([2.0])
    state = optimizer.init(weight)
    update, state = optimizer.update(jnp.zeros(1), state, weight)
    np.testing.assert_allclose(weight + update, [2.0 * (1 - 0.1 * 0.01)], rtol=1e-15)  # decay alone
    # chosen once, then never: momentum continues; first moment 0.1 * 0.9, second 0.001 * 0.999, both bias-corrected
    state = optimizer.init(weight)
    update, state = optimizer.update(jnp.ones(1), state, weight)
    update, state = optimizer.update(jnp.zeros(1), state, weight)
    step = (0.1 * 0.9 / (1 - 0.9**2)) / ((0.001 * 0.999 / (1 - 0.999**2)) ** 0.5 + 1e-8)
    np.testing.assert_allclose(update, [-0.1 * (step + 0.01 * 2.0)], rtol=1e-12)


def test_over_a_run_every_expert_gets_a_gradient() -> None:
    config = MakeMoEConfig(
        vocab_size=11, block_size=8, model_dim=16, num_heads=2, num_layers=2, num_experts=8, top_k=2, dropout=0.0
    )
    # default initialisation: with a strongly biased router an expert may get no token in the whole run, noise or not
    graphdef, weights = nnx.split(MakeMoE(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float32")))
    optimizer = optax.adamw(1e-2)
    text = np.random.default_rng(1).integers(0, 11, size=(20, 2, 9)).astype(np.int32)

    @jax.jit
    def run(weights: nnx.State) -> jax.Array:
        def loss(weights: nnx.State, batch: jax.Array, key: jax.Array) -> jax.Array:
            logits = nnx.merge(graphdef, weights)(batch[:, :-1], key=key)
            return next_token_loss(logits, batch[:, 1:])

        def step(carry: tuple, scanned: tuple) -> tuple[tuple, jax.Array]:
            weights, state = carry
            gradient = jax.grad(loss)(weights, *scanned)
            update, state = optimizer.update(gradient, state, weights)
            up = gradient["blocks"]["moe"]["experts"]["up"][...]
            return (optax.apply_updates(weights, update), state), (up != 0).any(axis=(-1, -2))

        keys = jax.random.split(jax.random.key(0), len(text))
        return jax.lax.scan(step, (weights, optimizer.init(weights)), (jnp.asarray(text), keys))[1]

    reached = np.asarray(run(weights))  # [step, layer, expert]
    assert reached.any(axis=0).all(), "every expert, at some step"
    assert not reached.all(), "and not everyone at every step"
