"""Fine-tuning a Hugging Face model with a correction bias: constant by default, or moved by the load of each step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the folders are written by transformers")
pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax.numpy as jnp
import transformers
from safetensors.numpy import save_file

import jax_moe
from jax_moe.porting.formats.safetensors import read_safetensors
from moe_train import loop
from parity_tests.shared.compare import check_exact
from parity_tests.shared.quick import QUICK
from parity_tests.table.family_cases import case_folder

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).parents[2]
WORDS = "--data few.npy --block-size 12 --batch-size 4 --steps 2 --eval-every 2 --eval-batches 1 --sample-length 1"
UPDATED = "--bias-update-rate 0.01 --recentre-bias"
FAMILIES = {  # where each family keeps its biases, and how they are updated here
    "glm4_moe": ({f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}, ""),
    "ernie4_5_moe": ({"model.layers.1.mlp.moe_statics.e_score_correction_bias"}, UPDATED),
}


def bias_of(path: Path) -> dict[str, np.ndarray]:
    """The correction biases of a run or a folder."""
    return {"bias": np.asarray(jax_moe.load(path).moe.router.correction_bias[...])}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_fine_tuned(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is trained, dense layers and shared experts too; biases move only if asked; transformers loads the result."""
    names, update = FAMILIES[family]
    before = read_safetensors(case_folder(family, tmp_path / "theirs") / "model.safetensors")
    if update:  # stored in half precision, trained and written in fp32
        before |= {name: before[name].astype(jnp.bfloat16) for name in names}
        save_file(before, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    np.save(tmp_path / "few.npy", np.arange(1000, dtype=np.uint16) % 37)
    monkeypatch.chdir(tmp_path)
    words = f"train/train.py --pretrained theirs {WORDS} --learning-rate 0.01 --out tuned {update}"
    monkeypatch.setattr(sys, "argv", words.split())
    assert loop.main() == 0
    after = read_safetensors(tmp_path / "tuned" / "pretrained" / "model.safetensors")
    assert after.keys() == before.keys() >= names
    assert {name for name, value in before.items() if (after[name] == value).all()} == (set() if update else names)
    for name in names:
        moved = after[name] - before[name].astype(np.float32)
        assert after[name].dtype == np.float32 and abs(moved.mean()) < 1e-7  # measured: 6e-9
        assert np.abs(moved).max() <= 0.04 and (np.unique(moved).size > 1) == bool(update)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "pretrained")
    written = bias_of(tmp_path / "tuned" / "pretrained")
    shutil.rmtree(tmp_path / "tuned" / "pretrained")  # as if the run had been killed: its last checkpoint is read
    check_exact(bias_of(tmp_path / "tuned"), written, "the last checkpoint")


def test_resumed_split_over_devices_and_worked_by_hand(tmp_path: Path) -> None:
    """Four steps are two and two more, and the same on one device as on four; see `bias_runs.py`."""
    case_folder("glm4_moe", tmp_path / "glm")
    np.save(tmp_path / "few.npy", np.arange(1000, dtype=np.uint16) % 37)
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in (QUICK or {}).items())
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-W", "error", "-m", "parity_tests.train.bias_runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pretrained plain --bias-update-rate 0.1", "bias_update_rate=0.1: must be 0: mixtral has no correction"),
        ("--bias-update-rate 0.1", "bias_update_rate=0.1: must be 0 without --pretrained: makeMoE has no correction"),
        ("--bias-update-rate -1", "bias_update_rate=-1.0: must be at least 0"),
        ("--recentre-bias", "recentre_bias=True: must be used with --bias-update-rate"),
        ("--bias-rate 0.1", "--bias-rate: is --bias-update-rate here"),
    ],
)
def test_bad_requests_are_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "plain" in words:
        case_folder("mixtral", tmp_path / "plain")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train/train.py", *words.split()])
    assert loop.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
