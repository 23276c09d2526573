"""Training only the router: gradients, optimizer state and updates are those of the router's weights alone.

`nnx.split` takes the filter that says which variables are trained; all others are constants of the loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_moe

ROUTER = nnx.All(nnx.Param, nnx.PathContains("router"))
CONFIG = jax_moe.presets.olmoe(model_dim=16, expert_dim=16, num_experts=8, top_k=2)


def main(trained: nnx.filterlib.Filter = ROUTER) -> None:
    """Fits the answers of a layer whose router differs, and checks that nothing but the router moved."""
    teacher = jax_moe.MoE(CONFIG, rngs=nnx.Rngs(0))
    layer = nnx.clone(teacher)  # the same experts, another router
    layer.router.kernel[...] = jax.random.normal(jax.random.key(1), layer.router.kernel.shape) / 4
    before = jax_moe.to_torch(layer)

    graphdef, params, others = nnx.split(layer, trained, ...)
    optimizer = optax.adam(3e-2)
    held = sum(value.size for value in jax.tree.leaves(params))
    print(f"{held} of {held + sum(value.size for value in jax.tree.leaves(others))} weights are trained")

    @jax.jit
    def step(params: nnx.State, state: optax.OptState, key: jax.Array) -> tuple:
        x_BTD = jax.random.normal(key, (8, 32, CONFIG.model_dim))
        target_BTD = teacher(x_BTD)[0]

        def loss_of(params: nnx.State) -> jax.Array:
            return jnp.square(nnx.merge(graphdef, params, others)(x_BTD)[0] - target_BTD).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for number in range(150):
        params, state, loss = step(params, state, jax.random.key(number))
        losses.append(float(loss))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    layer = nnx.merge(graphdef, params, others)
    changed = [name for name, value in jax_moe.to_torch(layer).items() if not np.array_equal(value, before[name])]
    print(f"{len(changed)} of {len(before)} tensors changed: {', '.join(changed)}")
    assert changed == ["router.linear.weight"], "the experts are the same bits as before"
    assert losses[-1] < 0.5 * losses[0], "the router learns which experts to choose"


if __name__ == "__main__":
    main()
