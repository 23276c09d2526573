"""What the comparisons are given is checked before anything runs, and losses of bf16 logits are taken in fp32."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="this leg has no PyTorch")

from flax import nnx  # noqa: E402

from jax_moe import MakeMoE, MakeMoEConfig, MoE, presets  # noqa: E402
from jax_moe.porting.checkpoint import Checkpoint  # noqa: E402
from moe_parity import compare_modules, transpose  # noqa: E402
from moe_parity.compare import compare_checkpoint, next_token_loss  # noqa: E402

MAPPING = {"weight": ("kernel", transpose), "bias": "bias"}
BAD_INPUTS: list[tuple[Any, str]] = [
    (
        [1.0, 2.0, 3.0],
        r"inputs\[0\]='float': must be an array; np\.asarray\(\[\.\.\.\]\) of a list, and a tuple of arrays",
    ),
    (
        np.zeros((0, 3), np.float32),
        r"inputs\[0\]\.shape=\(0, 3\): must be of at least one number: empty arrays always agree",
    ),
    (np.asarray([["a", "b", "c"]]), r"inputs\[0\]\.dtype='<U1': must be of numbers or booleans"),
    ((), r"inputs=\(\): must be at least one array"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS, ids=[message[:24] for _, message in BAD_INPUTS])
def test_compare_modules_names_the_input(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        compare_modules(torch.nn.Linear(3, 2), nnx.Linear(3, 2, rngs=nnx.Rngs(0)), MAPPING, inputs)


@pytest.mark.parametrize(
    "x", [np.ones((2, 3), ml_dtypes.bfloat16), torch.ones(2, 3).bfloat16()], ids=["numpy", "torch"]
)
def test_compare_modules_takes_bf16(x: Any) -> None:
    ours = nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert compare_modules(torch.nn.Linear(3, 2).bfloat16(), ours, MAPPING, x).passed


def test_a_dtype_without_a_tolerance_asks_for_one() -> None:
    ours = nnx.Linear(3, 2, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    theirs = torch.nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"^tolerance=None: must be given for parameters of complex64"):
        compare_modules(theirs, ours, MAPPING, np.ones((2, 3), np.float32))


LAYER = Checkpoint("moe", MoE(presets.mixtral(8, 6, 4, 2)))
TINY = MakeMoEConfig(vocab_size=5, block_size=4, model_dim=4, num_heads=2, num_layers=1, num_experts=2)
MODEL = Checkpoint("makemoe", MakeMoE(TINY))


@pytest.mark.parametrize(
    ("checkpoint", "x", "message"),
    [
        (LAYER, np.zeros((3, 8), np.float32), r"x_BTD has shape \(3, 8\): must have 3 dims \[B, T, D\]"),
        (LAYER, np.zeros((1, 3, 7), np.float32), r"x_BTD has width 7: must be model_dim=8"),
        (LAYER, np.zeros((1, 3, 8), np.int32), r"x_BTD has dtype int32: must be floating"),
        (LAYER, np.zeros((0, 3, 8), np.float32), r"x_BTD\.shape=\(0, 3, 8\): must be of at least one position"),
        (MODEL, np.zeros(3, np.int32), r"tokens_BT has shape \(3,\): must have 2 dims \[B, T\]"),
        (MODEL, np.zeros((1, 3), np.float32), r"tokens_BT has dtype float32: must be integer"),
    ],
)
def test_compare_checkpoint_names_the_batch(checkpoint: Checkpoint, x: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        compare_checkpoint(checkpoint, x)


def test_a_loss_of_bf16_logits_is_that_of_the_same_numbers_in_fp32() -> None:
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(size=(4, 64, 11)) * 3, jnp.bfloat16)
    tokens = jnp.asarray(generator.integers(0, 11, (4, 64)))
    found = next_token_loss(logits, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, next_token_loss(logits.astype(jnp.float32), tokens), rtol=1e-7)  # measured: 0
