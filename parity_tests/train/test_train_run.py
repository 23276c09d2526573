"""Whole runs of `python train/train.py` in subprocesses, and the training loop with a learner that only counts.

Runs that are stopped twice and resumed, or split over eight devices, must give the numbers of an uninterrupted run. All
runs share a compilation cache. Long because every test continues or compares the same run.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from moe_train import loop
from moe_train.configs.settings import ModelSettings, TrainConfig
from moe_train.data import text as data
from moe_train.run import folder as run_folder
from moe_train.run import metrics
from moe_train.run.keep import Keep
from moe_train.run.logger import open_logger
from moe_train.run.metrics import Evaluation
from parity_tests.shared.quick import QUICK

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).parents[2]
SCRIPT, INSTALLED = (str(ROOT / "train" / "train.py"),), ("-m", "jax_moe", "train")
TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(60))
SETTINGS = (
    "--data text.txt --steps 12 --eval-every 4 --eval-batches 2 --checkpoint-every 5 --batch-size 8 "
    "--num-layers 2 --model-dim 16 --num-heads 2 --num-experts 4 --block-size 8 --warmup-steps 2 "
    "--sample-length 20 --balance-loss-weight 0.01"
)


class Place:
    """A folder with a text, where runs are made."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "text.txt").write_text(TEXT)

    def start(self, *words: str, devices: int = 1, command: tuple[str, ...] = SCRIPT) -> subprocess.Popen[str]:
        """Starts the command with warnings as errors, and without optimisation, which halves the compile time."""
        flags = " ".join(f"--{name}={str(value).lower()}" for name, value in (QUICK or {}).items())
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            [sys.executable, "-W", "error", *command, *words], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    def run(self, *words: str, devices: int = 1) -> str:
        """The command's output; it must succeed and print nothing on stderr."""
        process = self.start(*words, devices=devices)
        out, error = process.communicate(timeout=300)
        assert (process.returncode, error) == (0, "")
        return out

    def stopped(self, number: int, after: str, *words: str, command: tuple[str, ...] = SCRIPT) -> str:
        """The output of a run that gets a signal as soon as it has printed a line beginning with `after`."""
        with self.start(*words, command=command) as process:
            assert process.stdout is not None and process.stderr is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith(after):
                    process.send_signal(number)
            error = process.stderr.read()
        assert (process.returncode, error) == (130, "")
        return "".join(lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(place: Place) -> tuple[Path, str]:
    """The uninterrupted run: its folder and what it printed."""
    out = place.run(*SETTINGS.split(), "--out", "whole")
    return place.folder / "whole", out


def numbers(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in metrics.read(folder)]


def state(folder: Path, step: int) -> Any:
    """Weights and moments of a checkpoint that was written on a single device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax warns that no target is given; plain arrays are wanted
        return ocp.load_checkpointables((folder / "checkpoints" / str(step)).absolute())["state"]


def assert_same_run(first: Path, second: Path) -> None:
    """Metrics, weights and moments agree bit for bit."""
    assert numbers(first) == numbers(second)
    jax.tree.map(np.testing.assert_array_equal, state(first, 12), state(second, 12))
    assert (first / "sample.txt").read_text() == (second / "sample.txt").read_text()
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_run_writes_everything(whole: tuple[Path, str]) -> None:
    folder, out = whole
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "loss.png", "expert_load.png", "sample.txt", "model.safetensors", "checkpoints",
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()) == ["10", "12"]
    rows = metrics.read(folder)
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    for row in rows:
        assert np.shape(row["expert_load"]) == (2, 4) and np.shape(row["dropped_fraction"]) == (2,)
        np.testing.assert_allclose(np.sum(row["expert_load"], axis=1), 1, rtol=1e-6)
        assert f"step {row['step']}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}" in out
    assert 3 < rows[0]["train_loss"] < 7  # ln 27 = 3.3, plus what Kaiming's wide head adds
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5  # measured: 4.06 to 3.14
    sample = (folder / "sample.txt").read_text()
    assert sample.startswith("\n") and len(sample) == 22 and sample in out
    written = json.loads((folder / "config.json").read_text())
    assert written["text"]["vocabulary"] == "".join(sorted(set(TEXT)))
    weights = load_file(folder / "model.safetensors")
    trained = [value for name, value in weights.items() if not name.endswith("tril")]
    assert written["parameters"] == sum(value.size for value in trained)
    np.testing.assert_array_equal(weights["ln_f.weight"], state(folder, 12)["params"]["final_norm"]["scale"])


def test_stopped_twice_and_resumed_is_the_same_run(place: Place, whole: tuple[Path, str]) -> None:
    """SIGINT while the first step compiles, SIGTERM at the start of the resumed run, then a run to the end.

    The second part is started by the installed command, which names itself in what the user types to go on.
    """
    out = place.stopped(signal.SIGINT, "step 0:", *SETTINGS.split(), "--out", "parts")
    match = re.search(r"stopped and saved at step (\d+) of 12; to go on: python (\S+) (--resume --out parts)\n", out)
    assert match and int(match[1]) < 12 and match[2] == SCRIPT[0], out
    assert "step 4:" not in out
    out = place.stopped(signal.SIGTERM, "parts:", *match[3].split(), command=INSTALLED)
    assert "to go on: jax-moe train --resume --out parts\n" in out
    out = place.run(*match[3].split())
    assert "step 12:" in out
    assert_same_run(whole[0], place.folder / "parts")


def test_resumed_after_a_crash_is_the_same_run(place: Place, whole: tuple[Path, str]) -> None:
    """A run killed after step 10: an older checkpoint, metrics beyond it, and a truncated last line."""
    crashed = place.folder / "crashed"
    shutil.copytree(whole[0], crashed)
    shutil.rmtree(crashed / "checkpoints" / "12")
    (crashed / "checkpoints" / "12.sha256").unlink()
    (crashed / "sample.txt").unlink()
    (crashed / "model.safetensors").unlink()
    path = crashed / metrics.FILE
    path.write_text(path.read_text()[:-40])
    place.run("--resume", "--out", "crashed")
    assert_same_run(whole[0], crashed)


def test_eight_devices_give_the_same_drops_and_curve(place: Place, whole: tuple[Path, str]) -> None:
    """On a mesh of eight devices; then its last checkpoint is lost, and another mesh goes on from the one before."""
    eight = place.folder / "eight"
    one, other = "data=4,expert=2", "expert=2,sequence=2,tensor=2 --exchange padded"
    out = place.run(*SETTINGS.split(), "--mesh", *one.split(), "--out", "eight", devices=8)
    same_curve(whole[0], eight)
    shutil.rmtree(eight / "checkpoints" / "12")
    (eight / "checkpoints" / "12.sha256").unlink()
    out += place.run("--resume", "--mesh", *other.split(), "--out", "eight", devices=8)
    assert out.count("8 of 8 cpu devices") == 2
    same_curve(whole[0], eight)


def same_curve(first: Path, second: Path) -> None:
    """Raises unless both runs have the same drops and loads, and the same losses and weights but for rounding."""
    one, other = numbers(first), numbers(second)
    assert [row["dropped_fraction"] for row in one] == [row["dropped_fraction"] for row in other]
    assert [row["expert_load"] for row in one] == [row["expert_load"] for row in other]
    for name in ("train_loss", "val_loss"):
        # measured: 1.2e-7
        np.testing.assert_allclose([row[name] for row in other], [row[name] for row in one], rtol=1e-6)
    weights = load_file(second / "model.safetensors")
    for key, value in load_file(first / "model.safetensors").items():
        np.testing.assert_allclose(weights[key], value, rtol=0, atol=1e-6, err_msg=key)  # measured: 1.2e-7


def test_what_cannot_be_resumed_or_overwritten(place: Place, whole: tuple[Path, str], monkeypatch, capsys) -> None:
    monkeypatch.chdir(place.folder)
    broken = place.folder / "broken"
    shutil.copytree(whole[0], broken)

    def refused(*words: str) -> str:
        before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", ["train/train.py", *words])
        assert loop.main() == 2
        assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "must be new or empty; --resume continues" in refused(*SETTINGS.split(), "--out", "broken")
    assert "num_layers=3: must be 2 as in broken" in refused("--resume", "--out", "broken", "--num-layers", "3")
    assert "framework='torch': must be 'jax'" in refused("--resume", "--out", "broken", "--framework", "torch")
    (place.folder / "other.txt").write_text(TEXT.replace("beer", "milk"))
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps({**settings, "settings": {**settings["settings"], "data": "other.txt"}})
    )
    assert "must be of the 26 characters that the model knows" in refused("--resume", "--out", "broken")
    # settings and checkpoint of different models: the checkpoint stores its settings
    (broken / "config.json").write_text(json.dumps({**settings, "settings": {**settings["settings"], "model_dim": 32}}))
    assert "must be of this model" in refused("--resume", "--out", "broken")
    (broken / "config.json").write_text(json.dumps(settings)[:-50])
    assert "config.json: must be the settings of a run" in refused("--resume", "--out", "broken")
    (broken / "config.json").write_text(json.dumps(settings))
    for path in (broken / "checkpoints" / "12" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    assert "must be a whole checkpoint, it is damaged or cut short" in refused("--resume", "--out", "broken")
    shutil.rmtree(broken / "checkpoints")
    assert "resume: must find a checkpoint" in refused("--resume", "--out", "broken")


# The loop with a learner that only counts


class CountingLearner:
    """A learner whose weights are the number of its steps."""

    num_parameters, device, compiles = 1, "no device", False

    def __init__(self, loss: float = 1.0):
        self.steps, self.loss, self.saved, self.on_step = 0, loss, [], lambda step: None

    def train_step(self, step: int, tokens_BT1: np.ndarray) -> float:
        assert step == self.steps, "every step once and in order"
        self.steps += 1
        self.on_step(step)
        return self.loss

    def evaluate(self, step: int, use: str, batches: Iterable[np.ndarray]) -> Evaluation:
        assert step == self.steps
        self.evaluated = len(list(batches))
        return Evaluation(1 / (step + 1) + (use == "eval_val"), [0.0], [[0.25, 0.75]], [0.5], [1.0])

    def save(self, folder: Path, step: int, settings: dict[str, Any], keep: Keep) -> None:
        assert step == self.steps
        self.saved.append(step)

    def restore(self, folder: Path) -> tuple[int, dict[str, Any]]:
        raise AssertionError("never resumed")

    def memory(self) -> None:
        return None

    def sample(self, prompt: list[int], length: int, temperature: float) -> list[int]:
        return prompt + [0] * length

    def write(self, folder: Path) -> None:
        run_folder.write_weights(folder, {"w": np.arange(6.0).reshape(2, 3).T})


def a_run(folder: Path, loss: float = 1.0, **changes: Any) -> loop.Run:
    """A run of ten steps, evaluated every three, saved every four."""
    config = TrainConfig(steps=10, eval_every=3, checkpoint_every=4, eval_batches=2, final_eval_batches=7, batch_size=2)
    config = dataclasses.replace(config, model=ModelSettings(block_size=4), sample_prompt="b", **changes)
    folder, lock = run_folder.claim(folder)
    return loop.Run(config, folder, data.tokenize(TEXT, "here", 4), CountingLearner(loss), 0, [], lock)


def test_order_of_evaluations_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    assert loop.train(run) == 0
    assert isinstance(run.learner, CountingLearner)
    assert run.learner.saved == [4, 8, 10]
    assert [row["step"] for row in metrics.read(run.folder)] == [0, 3, 6, 9, 10]
    assert run.learner.evaluated == 7, "the last evaluation has final_eval_batches"
    assert "step 3: train loss 0.2500, val loss 1.2500 (" in capsys.readouterr().out
    np.testing.assert_array_equal(load_file(run.folder / "model.safetensors")["w"], [[0, 3], [1, 4], [2, 5]])


def test_a_signal_between_steps_saves_and_skips_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run")
    assert isinstance(run.learner, CountingLearner)
    run.learner.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None
    assert loop.train(run) == 130
    assert run.learner.saved == [4, 6]
    assert [row["step"] for row in metrics.read(run.folder)] == [0, 3], "an evaluation cut short leaves no row"
    assert "stopped and saved at step 6 of 10; to go on: python" in capsys.readouterr().out
    assert not (run.folder / "sample.txt").exists()


def test_a_loss_that_is_no_number_ends_the_run_unsaved(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", loss=float("nan"))
    with pytest.raises(loop.DivergedError, match="step 2: the loss is nan"):
        loop.train(run)
    assert isinstance(run.learner, CountingLearner) and run.learner.saved == []


def test_mlflow_holds_settings_and_losses_across_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    run = a_run(tmp_path / "run", logger="mlflow")
    assert isinstance(run.learner, CountingLearner)
    run.learner.on_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 4 else None
    assert loop.train(run) == 130
    run.learner.on_step, run.start = lambda step: None, 5
    assert loop.train(run) == 0
    client = open_logger(run.folder, run.config).client  # type: ignore[attr-defined]
    (experiment,) = [found for found in client.search_experiments() if found.name == "jax_moe"]
    (stored,) = client.search_runs([experiment.experiment_id])
    assert stored.data.params["learning_rate"] == "0.001" and stored.data.params["top_k"] == "2"
    for name in ("train_loss", "val_loss"):
        history = [(metric.step, metric.value) for metric in client.get_metric_history(stored.info.run_id, name)]
        assert sorted(history) == [(row["step"], row[name]) for row in metrics.read(run.folder)]
        assert len(history) == 5
    assert (run.folder / "mlflow.db").exists()
