"""What the reference does otherwise than the published files need, reduced."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

import jax_moe  # noqa: E402
from parity_tests.families.cases import CASES  # noqa: E402
from parity_tests.families.reference import save_model  # noqa: E402


def test_a_published_folder_of_longcat(tmp_path: Path) -> None:
    """Zero experts have no tensors: `load_moe` reads the folder with and without them, transformers only with them."""
    save_model(CASES["longcat_flash"], tmp_path)
    moe, file = jax_moe.load_moe(tmp_path, 0), tmp_path / "model.safetensors"
    assert (moe.config.num_experts, moe.config.identity_experts, moe.experts.gate.shape[0]) == (8, 2, 6)
    spare = {f"model.layers.0.mlp.experts.{e}.{name}_proj.weight" for e in (6, 7) for name in ("gate", "up")}
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name not in spare}, file, {"format": "pt"})
    again = jax_moe.load_moe(tmp_path, 0)
    for name, value in jax_moe.to_torch(moe).items():
        np.testing.assert_array_equal(jax_moe.to_torch(again)[name], value)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.LongcatFlashForCausalLM.from_pretrained(tmp_path)
