"""Encoder and decoder of one model: their layers are numbered on, each with its own contract and weights."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe  # noqa: E402
from jax_moe.porting.mixture import open_mixtures  # noqa: E402
from parity_tests.cli.commands import fails, run  # noqa: E402
from parity_tests.families.cases import CASES  # noqa: E402
from parity_tests.families.reference import save_model  # noqa: E402


def test_layers_are_numbered_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NLLB's decoder has experts of another width than its encoder."""
    folder = tmp_path / "nllb"
    transformers.utils.logging.disable_progress_bar()
    state = save_model(CASES["nllb_moe"], folder).state_dict()
    assert jax_moe.moe_layers(folder) == (0, 1, 2)
    assert open_mixtures(folder).in_words == "0, 1 (the encoder's 0, 1), 2 (the decoder's 0)"
    encoder, decoder = jax_moe.load_moe(folder, 1), jax_moe.load_moe(folder, 2)
    assert (encoder.config.expert_dim, decoder.config.expert_dim) == (6, 4)
    theirs = state["model.decoder.layers.0.ffn.experts.expert_5.fc1.weight"].numpy()
    np.testing.assert_array_equal(np.asarray(decoder.experts.up[...])[5], theirs.T)
    assert "the decoder's 0)" in run(capsys, "inspect", folder)
    assert "layer=3: must be one of 0, 1 (the encoder's 0, 1), 2 (the decoder's 0)\n" in fails(
        capsys, "inspect", folder, "--layers", "3"
    )
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "encoder_layers": None}))
    assert "config.json: encoder_layers=None: must be a number of layers\n" in fails(capsys, "inspect", folder)
