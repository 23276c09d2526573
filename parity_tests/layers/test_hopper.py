"""The kernels for Hopper GPUs, elsewhere in Pallas' interpreter: products, gradients, and a layer that uses them."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu

from jax_moe import MoE, presets
from jax_moe.kernels import devices, hopper
from parity_tests.shared.compare import check_close

pytestmark = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "force_gpu_interpret_mode"), reason="jax before 0.11 has no interpreter of these kernels"
)
BLOCKS = np.array([1, 2, 1])  # of three experts; a last block belongs to none
LAYER = dataclasses.replace(presets.mixtral(model_dim=128, expert_dim=128, num_experts=3, top_k=2), dispatcher="blocks")


def on_hopper() -> contextlib.AbstractContextManager:
    """The kernels as they are on a Hopper GPU; else interpreted."""
    here = devices.hopper_serves("bfloat16", devices.BLOCK, devices.BLOCK)
    return contextlib.nullcontext() if here else mosaic_gpu.force_gpu_interpret_mode()


def normal(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def products(D: int, F: int, expert_I: list[int], product: object = None) -> dict[str, np.ndarray]:
    """The answer and both gradients, by our kernels or by `product` on fp32 operands."""
    end = np.cumsum(BLOCKS)
    x, weight, g = normal(0, 5 * hopper.BLOCK, D), normal(1, 3, D, F), normal(2, 5 * hopper.BLOCK, F)
    x, g = (a.at[4 * hopper.BLOCK :].set(0) for a in (x, g))
    if product is None:
        arrays = [jnp.asarray(a, jnp.int32) for a in (expert_I, end - BLOCKS, BLOCKS)]
        y, backward = jax.vjp(lambda x, weight: hopper.block_product(x, weight, *arrays), x, weight)
        by_x, by_weight = backward(g)
    else:
        wide = (a.astype(jnp.float32) for a in (x, weight))
        y, backward = jax.vjp(lambda x, weight: by_expert(x, weight, expert_I), *wide)
        by_x, by_weight = backward(g.astype(jnp.float32))
    return {name: np.asarray(a, np.float32) for name, a in (("y", y), ("x", by_x), ("weight", by_weight))}


def by_expert(x: jax.Array, weight: jax.Array, expert_I: list[int]) -> jax.Array:
    rows = x.reshape(len(expert_I), hopper.BLOCK, -1)
    return jnp.concatenate([rows[i] @ weight[e] for i, e in enumerate(expert_I)])


@pytest.mark.parametrize(("D", "F"), [(128, 256), (192, 136)])  # the second in parts of tiles
def test_products(D: int, F: int) -> None:
    expert_I = [0, 1, 1, 2, 2]
    with on_hopper():
        found = products(D, F, expert_I)
    expected = products(D, F, expert_I, by_expert)
    check_close(found, expected, 2e-2, f"{D} x {F}")  # measured: 3.1e-3, bf16 rounding
    with pytest.raises(AssertionError):
        check_close(found, products(D, F, [1, 0, 0, 2, 2], by_expert), 2e-2, "experts exchanged")


def test_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some padding holds NaN, so that whatever reads its rows shows."""
    layer = MoE(LAYER, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    mask = jnp.arange(24)[None] % 5 != 0
    x = jnp.where(mask[..., None], normal(3, 1, 24, 128), jnp.nan)

    def run(dispatcher: str) -> dict[str, np.ndarray]:
        config = dataclasses.replace(LAYER, dispatcher=dispatcher)  # type: ignore[arg-type]
        params = nnx.state(layer)

        def loss(params: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: MoE(config))), params)(x, mask_BT=mask)[0]
            return (y.astype(jnp.float32) ** 2).sum(), y

        (by_params, by_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        # the router reads padding too
        kept = [(path, leaf) for path, leaf in nnx.to_flat_state(by_params) if "router" not in path]
        named = {".".join(map(str, path)): leaf[...] for path, leaf in kept}
        return {name: np.asarray(a, np.float32) for name, a in (named | {"x": by_x[:, 1:5], "y": y}).items()}

    expected = run("grouped")
    with on_hopper():
        monkeypatch.setattr(devices, "hopper_serves", lambda *_: True)
        found = run("blocks")
    assert all(np.isfinite(a).all() for a in found.values())
    check_close(found, expected, 5e-2, "blocks")  # measured: 1.1e-2, bf16 rounding
