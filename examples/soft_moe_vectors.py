"""Soft MoE on a set of vectors: which points of a cloud lie on its larger circle?

A set has no order and is not causal, which is what Soft MoE needs: each slot reads a mix of all vectors of the set.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_moe

STEPS, WIDTH = 120, 16


class OnTheLarger(nnx.Module):
    """For every point of a set, the logit that it lies on the larger of the set's two circles."""

    def __init__(self, rngs: nnx.Rngs):
        config = jax_moe.SoftMoEConfig(model_dim=WIDTH, num_experts=4, num_slots=2, hidden_dims=(32,))
        self.up = nnx.Sequential(nnx.Linear(2, 32, rngs=rngs), nnx.relu, nnx.Linear(32, WIDTH, rngs=rngs))
        self.moe = jax_moe.SoftMoE(config, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(2 * WIDTH, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 1, rngs=rngs))

    def __call__(self, x_BTI: jax.Array, mask_BT: jax.Array | None = None) -> jax.Array:
        """Logits; `mask_BT` is False at padding."""
        x_BTD = self.up(x_BTI)
        y_BTD, _ = self.moe(x_BTD, mask_BT=mask_BT)
        return self.head(jnp.concatenate([x_BTD, y_BTD], axis=-1))[..., 0]


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sets of 24 points on two circles, whose radii change from set to set, and which circle each point is on."""
    radius_key, choice_key, angle_key = jax.random.split(key, 3)
    small_B1 = jax.random.uniform(radius_key, (32, 1), minval=0.5, maxval=2.0)
    larger_BT = jax.random.bernoulli(choice_key, 0.5, (32, 24))
    radius_BT = jnp.where(larger_BT, 1.5 * small_B1, small_B1)
    angle_BT = jax.random.uniform(angle_key, (32, 24), maxval=2 * jnp.pi)
    return radius_BT[..., None] * jnp.stack([jnp.cos(angle_BT), jnp.sin(angle_BT)], axis=-1), larger_BT


def main(steps: int = STEPS) -> None:
    """Trains, then checks accuracy, that the order of a set does not matter, and that padding is not read."""
    graphdef, params = nnx.split(OnTheLarger(nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: nnx.State, state: optax.OptState, key: jax.Array) -> tuple:
        x_BTI, larger_BT = batch(key)

        def loss_of(params: nnx.State) -> jax.Array:
            return optax.sigmoid_binary_cross_entropy(nnx.merge(graphdef, params)(x_BTI), larger_BT).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for number in range(steps):
        params, state, loss = step(params, state, jax.random.key(number))
        if number % 40 == 0:
            print(f"step {number:3}: loss {float(loss):.3f}")
    model = jax.jit(nnx.merge(graphdef, params))

    x_BTI, larger_BT = batch(jax.random.key(10_000))
    logits_BT = model(x_BTI)
    accuracy = float(((logits_BT > 0) == larger_BT).mean())
    radius_BT = jnp.linalg.norm(x_BTI, axis=-1)
    alone = max(float(((radius_BT > bound) == larger_BT).mean()) for bound in np.linspace(0.5, 3, 50))
    print(f"new sets: {accuracy:.1%} of the points are told right; by the best bound on their radius alone {alone:.1%}")

    order_T = np.random.default_rng(0).permutation(24)
    moved = float(np.abs(model(x_BTI[:, order_T]) - logits_BT[:, order_T]).max())
    padded_BTI = jnp.concatenate([x_BTI, jnp.full_like(x_BTI[:, :5], jnp.nan)], axis=1)
    mask_BT = jnp.arange(29)[None].repeat(32, axis=0) < 24
    changed = float(np.abs(model(padded_BTI, mask_BT)[:, :24] - logits_BT).max())
    print(f"another order of the points moves a logit by at most {moved:.0e}, padding full of NaN by {changed:.0e}")
    assert accuracy > 0.9 > alone, "the larger circle is found, which takes more than a look at single points"
    assert moved < 1e-4 and changed < 1e-4, "neither order nor padding matters"


if __name__ == "__main__":
    main()
