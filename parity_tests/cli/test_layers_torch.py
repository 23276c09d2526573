"""`jax-moe parity` of layers by themselves, against `torch_ref`."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")

from moe_cli.main import main
from parity_tests.porting.mixture_folders import deepseek


def test_parity_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = deepseek(tmp_path / "deepseek")
    assert main(["parity", str(folder), "--layers", "3,1", "--json", "--dtype", "float64"]) == 0
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1 and "the mixture of a layer is known, not the whole decoder" in streams.err
    reports = json.loads(streams.out)
    assert [one["layer"] for one in reports] == [3, 1] and all(one["passed"] for one in reports)
