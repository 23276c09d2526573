"""README's made-up family, run from README itself: saved under its names and loaded again."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.porting.families.hf import FAMILIES
from jax_moe.porting.formats.safetensors import read_safetensors
from parity_tests.shared.compare import MismatchError, check_exact
from parity_tests.shared.filled import filled

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- a new family: begin -->\n```python\n", "```\n<!-- a new family: end -->"


def code() -> str:
    """What README shows."""
    return README.read_text().split(BEGIN, 1)[1].split(END, 1)[0]


def test_readme_adds_a_family_in_twenty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict = {}
    exec(code(), names)
    assert len([line for line in code().splitlines() if line.strip()]) <= 20
    monkeypatch.setitem(FAMILIES, "cool_moe", names["COOL"])
    config = jax_moe.DecoderConfig.grouped(
        vocab_size=11, model_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, logits_divisor=4.0,
        moe=presets.mixtral(8, 6, 4, 2),
    )
    model = filled(lambda: jax_moe.Decoder(config, rngs=nnx.Rngs(0)))
    jax_moe.save_pretrained(model, tmp_path / "cool", model_type="cool_moe")
    weights = read_safetensors(tmp_path / "cool" / "model.safetensors")
    for theirs, ours in (("gate", model.moe.experts.gate), ("down", model.moe.experts.down)):
        expected = np.asarray(ours[...])[1, 3].T
        check_exact({"w": weights[f"model.layers.1.mlp.expert.3.{theirs}.weight"]}, {"w": expected}, theirs)
    loaded, tokens = jax_moe.load_pretrained(tmp_path / "cool"), jnp.arange(6).reshape(2, 3)
    check_exact({"logits": np.asarray(loaded(tokens))}, {"logits": np.asarray(model(tokens))}, "loaded")
    loaded.moe.experts.gate[...], loaded.moe.experts.up[...] = loaded.moe.experts.up[...], loaded.moe.experts.gate[...]
    with pytest.raises(MismatchError):
        check_exact({"logits": np.asarray(loaded(tokens))}, {"logits": np.asarray(model(tokens))}, "gate and up exchanged")
