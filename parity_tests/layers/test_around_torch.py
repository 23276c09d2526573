"""Every intermediate value of layers with more than experts and a shared expert: all dispatchers against torch_ref."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from jax_moe.config.moe import AroundConfig, MoEConfig  # noqa: E402
from jax_moe.porting.state_dict import abstract_module  # noqa: E402
from parity_tests.shared.compare import check_close, check_exact  # noqa: E402
from parity_tests.shared.quick import QUICK  # noqa: E402
from parity_tests.table.cases import NORMED, WEIGHED, plain  # noqa: E402

TOLERANCE = 9e-15  # measured: 9.7e-16
IDENTITY = plain(num_experts=6, identity_experts=2)
LAYERS = {
    "identity experts": IDENTITY, "identity experts, capacity": IDENTITY.with_capacity(0.5), "norms": NORMED,
    "weighed": WEIGHED, "all": dataclasses.replace(
        WEIGHED, identity_experts=1, around=AroundConfig(latent_dim=3, latent_norm="rms"),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_stages(name: str) -> None:
    config, rng = LAYERS[name], np.random.default_rng(0)
    theirs = torch_ref.MoE(config).double().eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(torch.from_numpy(rng.normal(size=tuple(value.shape))))
    x_BTD, mask_BT = rng.normal(size=(2, 5, config.model_dim)), np.ones((2, 5), bool)
    mask_BT[0, -1] = False
    expected = theirs.run(torch.from_numpy(x_BTD), mask_BT=torch.from_numpy(mask_BT), watch=True).stages
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    for dispatcher in ("einsum", "gather") if config.capacity else ("einsum", "grouped", "ragged", "blocks", "chosen"):
        found = stages(dataclasses.replace(config, dispatcher=dispatcher), state, x_BTD, mask_BT)
        assert found.keys() == expected.keys()
        for stage, value in expected.items():
            mine, there = ({stage: np.asarray(one)} for one in (found[stage], value.detach().numpy()))
            if mine[stage].ndim > 1:  # of padding nothing is promised but the answer
                mine, there = ({stage: one[stage][mask_BT]} for one in (mine, there))
            where = f"{name}, {dispatcher}, {stage}"
            if mine[stage].dtype.kind == "i":
                check_exact({stage: mine[stage].astype(np.int64)}, {stage: there[stage].astype(np.int64)}, where)
            else:
                check_close(mine, there, TOLERANCE, where)


def stages(config: MoEConfig, state: dict, x_BTD: np.ndarray, mask_BT: np.ndarray) -> dict[str, jax.Array]:
    """What the JAX layer hands out."""
    with jax.enable_x64(True):
        moe = abstract_module(jax_moe.MoE, config, np.dtype(np.float64))
        moe = jax_moe.from_torch(moe, state, cast=True)
        run = jax.jit(lambda moe, x, mask: moe.run(x, mask_BT=mask, watch=True).stages, compiler_options=QUICK)
        return run(moe, jnp.asarray(x_BTD), jnp.asarray(mask_BT))
