"""A mixture of experts in a Linen model, through `flax.nnx.bridge.to_linen`.

The layer's weights become ordinary Linen parameters, and its statistics are returned as in NNX: nothing is sown.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.nnx import bridge

import jax_moe

CONFIG = jax_moe.presets.switch(model_dim=16, expert_dim=32, num_experts=4, capacity_factor=1.25)


class Block(linen.Module):
    """A Linen block with a layer norm before the mixture and a residual stream around both."""

    @linen.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax_moe.MoEStats]:
        """The block's answer, and the mixture's statistics."""
        moe = bridge.to_linen(jax_moe.MoE, CONFIG, name="moe")
        y_BTD, stats = moe(linen.LayerNorm(name="norm")(x_BTD))
        return x_BTD + y_BTD, stats


def main() -> None:
    """Calls the block, takes gradients, and checks both against the layer in NNX with the same weights."""
    x_BTD = jax.random.normal(jax.random.key(0), (2, 8, 16))
    block = Block()
    variables = linen.unbox(jax.jit(block.init)(jax.random.key(1), x_BTD))  # without the boxes of each weight's dims
    for path, value in jax.tree_util.tree_leaves_with_path(variables["params"]):
        print(f"{jax.tree_util.keystr(path, simple=True, separator='.'):20} {value.shape}")

    @jax.jit
    def call(variables: dict) -> tuple[jax.Array, jax_moe.MoEStats, dict]:
        def loss_of(params: dict) -> tuple[jax.Array, tuple]:
            y_BTD, stats = block.apply({**variables, "params": params}, x_BTD)
            return jnp.square(y_BTD).mean() + 0.01 * stats.load_balance_loss, (y_BTD, stats)

        gradients, (y_BTD, stats) = jax.grad(loss_of, has_aux=True)(variables["params"])
        return y_BTD, stats, gradients

    y_BTD, stats, gradients = call(variables)
    dropped, balance = float(stats.dropped_fraction), float(stats.load_balance_loss)
    print(f"dropped {dropped:.0%} of the choices, balance loss {balance:.3f}")
    assert all(np.abs(value).max() > 0 for value in jax.tree.leaves(gradients["moe"])), "every weight has a gradient"

    layer = jax_moe.MoE(CONFIG, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.State(variables["params"]["moe"]))
    normed_BTD = linen.LayerNorm().apply({"params": variables["params"]["norm"]}, x_BTD)
    expected_BTD = x_BTD + jax.jit(layer)(normed_BTD)[0]
    error = float(np.abs(y_BTD - expected_BTD).max())
    assert error < 1e-6, f"the block in Linen is the layer in NNX, error {error}"
    print("The block in Linen gives the numbers of the layer in NNX, and every weight of the mixture has a gradient.")


if __name__ == "__main__":
    main()
