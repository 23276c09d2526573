"""Layers that read more than vectors, tokens for a table or a state before the router, are compared with it."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch", reason="the reference is PyTorch")

import jax_moe
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.checkpoint import Checkpoint
from jax_moe.porting.families.torch_ref import TORCH_REF
from moe_parity import compare
from moe_parity.batch import beside, random_vectors
from moe_parity.sides import torch_ref as reference
from parity_tests.shared.filled import filled
from parity_tests.table.cases import BY_NAME

ROWS = {"tokens_BT": "a table of tokens", "router_state_BTI": "a network for a router, with a state"}


def report(row: str) -> Any:
    config = BY_NAME[row].config
    assert isinstance(config, MoEConfig)
    layer = filled(lambda: jax_moe.MoE(config, rngs=nnx.Rngs(0)), seed=1)
    if config.router.table_tokens:
        table = np.random.default_rng(0).integers(0, 2, (config.router.table_tokens, 1)) + np.arange(config.top_k)
        layer.router.expert_table[...] = table.astype(np.int32)
    x = random_vectors(config.model_dim, 2, 5, seed=0)
    return compare.compare_checkpoint(Checkpoint(TORCH_REF.name, layer), x, dtype="float64", grads=True)


@pytest.mark.parametrize("name", ROWS)
def test_both_sides_read_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what one side reads matters: the planted fault is another draw for PyTorch."""
    assert report(ROWS[name]).passed

    def other(config: Any, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {name: np.roll(value, 1, axis=1) for name, value in beside(config, shape).items()}

    monkeypatch.setattr(reference, "beside", other)
    assert not report(ROWS[name]).passed
