"""`train.py --export DIR`: from two processes of two devices each, and what is refused in one line."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_moe
from benchmarks.distributed import HELD, ends, free_port, launched, start
from jax_moe.disk import same_bits
from jax_moe.porting import checkpoint
from moe_train import loop
from parity_tests.porting.decoder_cases import decoder

pytestmark = pytest.mark.usefixtures("quick")
SETTINGS = (
    "--block-size 8 --batch-size 4 --steps 4 --eval-every 4 --eval-batches 1 --checkpoint-every 2 --warmup-steps 1 "
    "--sample-length 2 --learning-rate 0.01"
)


def command(monkeypatch: pytest.MonkeyPatch, place: Path, words: str) -> int:
    """Runs train.py in that folder; returns its exit code."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["train/train.py", *words.split()])
    return loop.main()


def same_weights(folder: Path, step: Path) -> bool:
    """Whether a folder holds the weights of a checkpoint, bit for bit."""
    here, there = (checkpoint.load(path).weights for path in (folder, step))
    assert here.keys() == there.keys() and len(here) > 10
    return all(same_bits(here[name], there[name]) for name in here)


def test_two_processes_export_the_last_checkpoint(tmp_path: Path) -> None:
    """A Mixtral on the mesh expert=2,sequence=2, a device pair in each process."""
    np.save(tmp_path / "tokens.npy", np.arange(400, dtype=np.uint16) % 11)
    jax_moe.save_pretrained(decoder("mixtral"), tmp_path / "tiny", model_type="mixtral")
    (tmp_path / "tiny" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    words = f"--data tokens.npy --pretrained tiny --mesh expert=2,sequence=2 {SETTINGS} --out run --export empty"
    flags = " ".join(word for word in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in word)
    started = (start(launch, tmp_path, 2, flags) for launch in launched(2, free_port(), words.split()))
    (status, out, error), other = ends(started)
    assert (status, error, other) == (0, "", (0, "", "")) and out.endswith("\nwrote run and empty\n")
    ruled, held = (int(found[2].replace(",", "")) for found in HELD.finditer(out))
    assert held == ruled + 8, "memory of a device as the rules say, and two counts of steps"
    exported, run = tmp_path / "empty", tmp_path / "run"
    assert same_weights(exported, run / "checkpoints" / "4")
    assert not same_weights(exported, run / "checkpoints" / "2"), "the comparison can fail"
    names = {"config.json", "model.safetensors", "tokenizer_config.json"}
    assert {path.name for path in exported.iterdir()} == names
    for name in names:
        assert (exported / name).read_bytes() == (run / "pretrained" / name).read_bytes(), name
    assert (exported / "config.json").read_bytes() == (tmp_path / "tiny" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--export taken", "export='taken': must be a new folder, or an empty one"),
        ("--export tokens.npy", "export='tokens.npy': must be a new folder, or an empty one"),
        ("--export no/where", "export='no/where': must be in a folder that exists, "),
        ("--export /proc/there", "export='/proc/there': must be a folder that can be written ("),
        (f"--export {'x' * 300}", "export='xxxx"),
        ("--export refused", "export='refused': must be neither refused nor inside or around it"),
        ("--export refused/in", "export='refused/in': must be neither refused nor inside or around it"),
        ("--export .", "export='.': must be neither refused nor inside or around it"),
        ("--export tiny/in --pretrained tiny", "export='tiny/in': must be neither tiny nor inside or around it"),
    ],
)
def test_bad_requests_are_one_line(tmp_path: Path, monkeypatch, capsys, words: str, message: str) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(400, dtype=np.uint16) % 11)
    jax_moe.save_pretrained(decoder("mixtral"), tmp_path / "tiny", model_type="mixtral")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    before = set(tmp_path.rglob("*"))
    assert command(monkeypatch, tmp_path, f"--data tokens.npy --out refused {SETTINGS} {words}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert set(tmp_path.rglob("*")) == before, "nothing may be written"
