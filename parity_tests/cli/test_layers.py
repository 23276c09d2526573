"""`jax-moe inspect` and `port` of layers by themselves, and of folders whose decoder is not known."""

from pathlib import Path

import numpy as np
import pytest

import jax_moe
from moe_cli.main import main
from parity_tests.cli.commands import fails, run
from parity_tests.porting.mixture_folders import deepseek, mixture
from parity_tests.shared.compare import check_exact

ALONE = "of deepseek_v32 the mixture of a layer is known, not the whole decoder"


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A folder of a model whose decoder is not known."""
    return deepseek(tmp_path / "deepseek")


def test_inspect(unknown: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers of one contract together; of a known decoder where they are named."""
    said = run(capsys, "inspect", unknown)
    assert said.startswith(f"deepseek_v32: mixtures in layers 1, 3; {ALONE}\nlayers 1, 3: 46 tensors, ")
    assert "  clusters: the best 2 of 3\n" in said and "sigmoid over all" in said
    one = run(capsys, "inspect", unknown, "--layers", "3", "--names")
    assert "\nlayer 3: 23 tensors, " in one and "model.layers.3.mlp.gate.e_score_correction_bias" in one
    assert run(capsys, "inspect", whole, "--layers", "2").startswith("qwen2_moe: mixtures in layers 0, 2\nlayer 2: ")


@pytest.mark.parametrize(
    ("layers", "said"),
    [("2", "layer=2: must be one of 1, 3; layer 2 has no mixture"), ("x", "layers='x': must be numbers")],
)
def test_layers_that_are_not_there(layers: str, said: str, unknown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("inspect", unknown), ("port", unknown, unknown.parent / "out"), ("parity", unknown)):
        assert said in fails(capsys, *words, "--layers", layers)
    assert not (unknown.parent / "out").exists()


def test_port_and_save_again(unknown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder a layer, which `load` reads and `save_moe` puts back."""
    out = tmp_path / "out"
    assert main(["port", str(unknown), str(out)]) == 0
    streams = capsys.readouterr()
    assert streams.err == f"jax-moe: {unknown}: {ALONE}: layers by themselves\n" and "2 layers: wrote" in streams.out
    assert sorted(entry.name for entry in out.iterdir()) == ["layer_1", "layer_3"]
    moe = jax_moe.load(out / "layer_3")
    expected = {"up": np.asarray(mixture(3).experts.up[...])}
    check_exact({"up": np.asarray(moe.experts.up[...])}, expected, "ported")
    before = (unknown / "model-3.safetensors").read_bytes()
    jax_moe.save_moe(moe, unknown, 3)
    assert (unknown / "model-3.safetensors").read_bytes() == before
    assert "exists already" in fails(capsys, "port", unknown, out, "--layers", "1")
    assert main(["port", str(unknown), str(out), "--layers", "1", "--overwrite"]) == 0
    assert [entry.name for entry in out.iterdir()] == ["layer_1"]
