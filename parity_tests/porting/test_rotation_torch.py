"""Queries turned in bf16: the numbers of transformers, whose families compute cos, sin and products in bf16 or fp32."""

import importlib
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

from jax_moe.attention.rope import rotate, rotations  # noqa: E402
from jax_moe.config.attention import RopeConfig  # noqa: E402
from jax_moe.porting.families import FAMILIES  # noqa: E402
from parity_tests.porting.hf_mutations import base_of  # noqa: E402
from parity_tests.porting.test_hf_config_torch import Reference  # noqa: E402

T, H = 200, 3
# Where the heads stand in the reference's arguments
HEADS = {"mixtral": 1, "olmoe": 1, "ernie4_5_moe": 1, "flex_olmo": 1, "deepseek_v2": 1, "llama4": 2}


def of_transformers(family: str, x_BTHA: np.ndarray) -> np.ndarray:
    """The reference's own function on bf16."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model = Reference(family).make(base_of(family)).eval()
    x = torch.from_numpy(x_BTHA).bfloat16()
    turns = model.model.rotary_emb(x[:, :, 0], torch.arange(T)[None])
    heads_first = HEADS[family] == 1
    given = x.transpose(1, 2) if heads_first else x
    turn = getattr(modeling, "apply_rotary_pos_emb", None) if isinstance(turns, tuple) else modeling.apply_rotary_emb
    found = turn(given, given, *(turns if isinstance(turns, tuple) else (turns,)))[0]
    return (found.transpose(1, 2) if heads_first else found).float().numpy()


def ours(rope: RopeConfig, x_BTHA: np.ndarray) -> np.ndarray:
    x = jnp.asarray(x_BTHA, jnp.bfloat16)
    turns = rotations(jnp.arange(T)[None], rope, x.shape[-1], jnp.dtype(x.dtype))
    turned = rotate(x, *turns, rope.pairs)
    assert turned.dtype == x.dtype
    return np.asarray(turned, np.float32)


@pytest.mark.parametrize("family", HEADS)
def test_the_numbers_of_transformers(family: str) -> None:
    """All but few numbers have the same bits (fp32 is rounded otherwise there); in the other dtype a third differ."""
    config: Any = FAMILIES[family].config({"model_type": family} | base_of(family))
    attention = next(layer.attention for layer in config.layers if getattr(layer.attention, "rope", None))
    width = attention.rope.width(getattr(attention, "rope_dim", None) or attention.head_dim)
    x = np.random.default_rng(0).normal(size=(1, T, H, width)).astype(np.float32)
    theirs = of_transformers(family, x)
    assert (ours(attention.rope, x) != theirs).mean() <= 5e-3  # measured 5.6e-4
    other = replace(attention.rope, dtype="input" if attention.rope.dtype == "float32" else "float32")
    assert (ours(other, x) != theirs).mean() > 0.1


def test_which_families_turn_in_fp32() -> None:
    found = {name for name in HEADS if _dtype(name) == "float32"}
    assert found == {"ernie4_5_moe", "flex_olmo", "deepseek_v2", "llama4"}


def _dtype(family: str) -> str:
    config: Any = FAMILIES[family].config({"model_type": family} | base_of(family))
    return next(layer.attention.rope.dtype for layer in config.layers if getattr(layer.attention, "rope", None))
