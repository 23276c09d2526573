"""`jax-moe parity` on Hugging Face folders: the report, a planted fault, and the message without the reference."""

import sys
from pathlib import Path
from typing import Any

import pytest

import jax_moe
from moe_cli.main import main
from parity_tests.cli.commands import fails
from parity_tests.porting.decoder_cases import decoder

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral folder that transformers wrote."""
    pytest.importorskip("torch", reason="the reference is PyTorch")
    pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")
    from parity_tests.table.family_cases import case_folder

    return case_folder("mixtral", tmp_path_factory.mktemp("theirs") / "model")


def test_parity_with_transformers(
    theirs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within tolerance, also from an Orbax folder; not if an expert's gate and up are exchanged on the JAX side."""
    orbax = theirs.parent / "orbax"
    assert main(["port", str(theirs), str(orbax)]) == 0
    assert main(["parity", str(orbax), "--num-tokens", "9"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "All 25 stages agree within tolerance in float32." in out and "FAILED" not in out
    from moe_parity import compare

    def faulty(path: Path, dtype: Any = None) -> Any:
        model = jax_moe.load_pretrained(path, dtype=dtype)
        up, gate = model.moe.experts.up, model.moe.experts.gate
        up[...], gate[...] = up[...].at[1, 2].set(gate[...][1, 2]), gate[...].at[1, 2].set(up[...][1, 2])
        return model

    monkeypatch.setattr(compare, "load_pretrained", faulty)
    assert main(["parity", str(theirs), "--num-tokens", "9"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 47 tensors differ, first model.layers.1.block_sparse_moe.experts.2.w1.weight" in out, out


def test_parity_without_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    jax_moe.save_pretrained(decoder("qwen2_moe"), whole, model_type="qwen2_moe")
    assert "num_tokens=1: must be at least 2" in fails(capsys, "parity", whole, "--num-tokens", "1")
    monkeypatch.setitem(sys.modules, "torch", None)  # what import does where it is not installed
    assert "parity needs PyTorch" in fails(capsys, "parity", whole)
    monkeypatch.undo()
    pytest.importorskip("torch", reason="the rest is said only where PyTorch is")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs transformers, which is not installed: pip install 'jax-moe[hf]'" in fails(capsys, "parity", whole)
