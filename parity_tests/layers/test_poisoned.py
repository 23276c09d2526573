"""Padding may hold NaN or infinity: answers, losses and every gradient are those of zeros there, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import MoE, MoEConfig, SoftMoE, SoftMoEConfig, presets
from parity_tests.shared.compare import check_exact
from parity_tests.shared.quick import QUICK

MASK = np.arange(10)[None] % 5 != 0
DROPLESS = presets.mixtral(model_dim=8, expert_dim=12, num_experts=4, top_k=2)
LAYERS: dict[str, MoEConfig | SoftMoEConfig] = {
    **{name: dataclasses.replace(DROPLESS, dispatcher=name)  # type: ignore[arg-type]
       for name in ("einsum", "grouped", "ragged", "blocks", "chosen")},
    **{f"{name}, capacity": dataclasses.replace(DROPLESS.with_capacity(1.0), dispatcher=name)  # type: ignore[arg-type]
       for name in ("einsum", "gather")},
    "soft": SoftMoEConfig(model_dim=8, num_experts=4, num_slots=2),
}


def answers(config: MoEConfig | SoftMoEConfig, padding: float, mask: np.ndarray = MASK) -> dict[str, np.ndarray]:
    layer = MoE(config) if isinstance(config, MoEConfig) else SoftMoE(config)
    graphdef, params = nnx.split(layer)
    x = np.random.default_rng(0).normal(size=(1, 10, 8)).astype(np.float32)
    x[~MASK] = padding

    def loss(params: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, stats = nnx.merge(graphdef, params)(x, mask_BT=jnp.asarray(mask))
        shown = y * MASK[..., None] if isinstance(config, SoftMoEConfig) else y
        return (shown**2).sum() + stats.load_balance_loss + stats.router_z_loss, y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)
    (value, y), (by_params, by_x) = run(params, x)
    named = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(by_params)}
    return {name: np.asarray(a) for name, a in (named | {"loss": value, "y": y, "x": by_x}).items()}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("padding", [np.nan, np.inf])
def test_padding_may_hold_anything(name: str, padding: float) -> None:
    check_exact(answers(LAYERS[name], padding), answers(LAYERS[name], 0), name)


def test_nan_in_a_token_shows() -> None:
    with jax.debug_nans(False):  # the planted NaN is wanted here, also where `make stress` lets none pass
        assert np.isnan(answers(LAYERS["grouped"], np.nan, np.ones_like(MASK))["loss"])
