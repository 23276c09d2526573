"""An array of the wrong shape, dtype or range is refused; the message names it and says what it must be.

Shapes and kinds are tested in a subprocess (see `bad_arrays.py`); traced arrays here.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import MoE, presets
from parity_tests.layers.bad_arrays import CASES, JAX_CASES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """jax_moe's message for every case."""
    return answers("jax")


def answers(framework: str) -> dict[str, str]:
    """A framework's message for every case, from a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-m", "parity_tests.layers.bad_arrays", framework]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*CASES, *JAX_CASES])
def test_the_caller_is_told(told: dict[str, str], case: str) -> None:
    if case == "a torch tensor":
        pytest.importorskip("torch", reason="this leg has no PyTorch")
    wanted = (CASES | JAX_CASES)[case][2].format(array="an array")
    assert told[case].startswith(wanted) and "\n" not in told[case], told[case]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dispatcher", ["einsum", "grouped", "ragged", "blocks", "chosen", "gather"])
def test_a_traced_expert_that_is_not_there_gives_nan_to_its_token_alone(dispatcher: str) -> None:
    config = presets.mixtral(8, 6, 4, 2).with_capacity(2.0 if dispatcher == "gather" else None)
    layer = MoE(dataclasses.replace(config, dispatcher=dispatcher))
    x_BTD = jax.random.normal(jax.random.key(0), (2, 5, 8))
    mask_BT = jnp.ones((2, 5), bool).at[1, 4].set(False)
    call = jax.jit(lambda expert_BTK: layer(x_BTD, expert_BTK=expert_BTK, mask_BT=mask_BT)[0])
    for wrong in (9, 4, -1):
        expert_BTK = jnp.tile(jnp.asarray([0, 1]), (2, 5, 1)).at[0, 1, 1].set(wrong).at[1, 4].set(wrong)
        nan_BT = np.isnan(np.asarray(call(expert_BTK))).any(axis=-1)
        assert np.argwhere(nan_BT).tolist() == [[0, 1]], "padding may name anything"
