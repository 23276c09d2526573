"""A mixture of experts in an NNX model of your own: a small regression whose rule changes from region to region.

The model is split once; `jax.jit` then works on plain arrays, and the layer's statistics come back with its answer.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jax_moe

STEPS = 100


class Regressor(nnx.Module):
    """A linear map, a mixture of experts beside a residual stream, and a head."""

    def __init__(self, rngs: nnx.Rngs):
        config = jax_moe.presets.mixtral(model_dim=16, expert_dim=32, num_experts=4, top_k=2)
        self.up = nnx.Linear(2, 16, rngs=rngs)
        self.moe = jax_moe.MoE(config, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x_BTI: jax.Array) -> tuple[jax.Array, jax_moe.MoEStats]:
        """The prediction for every point, and the mixture's statistics. The points of a set stand along T."""
        x_BTD = self.up(x_BTI)
        y_BTD, stats = self.moe(x_BTD)
        return self.head(x_BTD + y_BTD)[..., 0], stats


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points of a square, and a target that is another function in each quarter of it."""
    x_BTI = jax.random.uniform(key, (8, 32, 2), minval=-1, maxval=1)
    first, second = x_BTI[..., 0], x_BTI[..., 1]
    return x_BTI, jnp.where(first > 0, jnp.sin(4 * second), 2 * first * second) + jnp.where(second > 0, 1.0, -1.0)


def main(learning_rate: float = 1e-2) -> None:
    """Trains, prints the course of the loss and who did the work, and checks both."""
    graphdef, params = nnx.split(Regressor(nnx.Rngs(0)))
    optimizer = optax.adam(learning_rate)

    def loss_of(params: nnx.State, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax_moe.MoEStats]]:
        x_BTI, target_BT = batch(key)
        y_BT, stats = nnx.merge(graphdef, params)(x_BTI)
        error = jnp.square(y_BT - target_BT).mean()
        return error + 0.01 * stats.load_balance_loss, (error, stats)

    @jax.jit
    def step(params: nnx.State, state: optax.OptState, key: jax.Array) -> tuple:
        gradients, (error, stats) = jax.grad(loss_of, has_aux=True)(params, key)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, error, stats

    state, errors = optimizer.init(params), []
    for number in range(STEPS):
        params, state, error, stats = step(params, state, jax.random.key(number))
        errors.append(float(error))
        if number % 33 == 0:
            load = " ".join(f"{share:.2f}" for share in stats.expert_load_E)
            print(f"step {number:3}: squared error {errors[-1]:.3f}, share of choices by expert {load}")
    assert sum(errors[-10:]) < 0.2 * sum(errors[:10]), "the error falls to less than a fifth"
    assert float(stats.expert_load_E.min()) > 0.05, "every expert is used"
    print("Every expert is used, and the error fell to less than a fifth.")


if __name__ == "__main__":
    main()
