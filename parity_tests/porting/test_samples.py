"""Checkpoints and runs that an earlier version wrote load bit for bit; `samples/make.py` says how they were made."""

import json
import shutil
from pathlib import Path

import pytest

from parity_tests import samples
from parity_tests.samples import digests

HERE = Path(samples.__file__).parent
VERSIONS = sorted(path.name for path in HERE.glob("v*"))
READERS = dict.fromkeys(digests.CHECKPOINTS, digests.checkpoint) | {digests.TRAINING: digests.training}
RUNS = dict.fromkeys(digests.RUNS, digests.run)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*READERS, *RUNS])
def test_sample_loads_bit_for_bit(version: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "run_torch":
        pytest.importorskip("torch", reason="a run of the PyTorch side")
    folder = Path(shutil.copytree(HERE / version, tmp_path / version))
    monkeypatch.chdir(folder)
    expected = json.loads((folder / "digests.json").read_text())[name]
    found = (READERS | RUNS)[name](Path(name))
    assert found == expected and len(found) > 5


def test_a_changed_weight_is_seen(tmp_path: Path) -> None:
    """The planted fault: one bit of one weight."""
    folder = Path(shutil.copytree(HERE / VERSIONS[0] / "switch", tmp_path / "switch"))
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    expected = json.loads((HERE / VERSIONS[0] / "digests.json").read_text())["switch"]
    found = digests.checkpoint(folder)
    assert [name for name in expected if found[name] != expected[name]] == ["router.classifier.weight"]
