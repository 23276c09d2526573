"""Continued runs: longer, with the text at another path, or from another run's weights; and their output.

They start from copies of the small runs of the first version in `samples`.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_moe
from jax_moe.porting.checkpoint import load
from moe_train import loop, plots
from moe_train.configs.settings import TrainConfig
from moe_train.learners.longer import lengthened
from moe_train.options import read_settings
from moe_train.run import metrics
from moe_train.task import make_learner, read_task
from parity_tests import samples

pytestmark = pytest.mark.usefixtures("quick")
SAMPLES = Path(samples.__file__).parent / "v0_1_0"
FEW = "--data text.txt --steps 2 --batch-size 4 --eval-every 2 --eval-batches 1 --sample-length 3"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run, a stopped run and their text."""
    for name in ("run_finished", "run_stopped"):
        shutil.copytree(SAMPLES / name, tmp_path / name)
    shutil.copy(SAMPLES / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs train.py's main; returns its output, or the line of its error."""

    def call(words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train/train.py", *words.split()])
        code = loop.main()
        out, error = capsys.readouterr()
        if code:
            assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error or out

    return call


# Longer


def test_a_run_is_lengthened_and_says_what_becomes_of_its_rate(train, place: Path) -> None:
    """A finished run of four steps with cosine decay is lengthened, then resumed again as the longer run."""
    before = metrics.read(place / "run_finished")
    out = train("--resume --out run_finished --steps 8")
    # a cosine from 0.003 to 0.0003 after a warm-up step: its end after 3 of 3 steps, 0.00195 after 3 of 7
    assert (
        "8 steps in place of 4; the learning rate follows the cosine of 8 steps: 0.00195 at step 4, not 0.0003\n" in out
    )
    rows = metrics.read(place / "run_finished")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8] and rows[:3] == before
    assert json.loads((place / "run_finished" / "config.json").read_text())["settings"]["steps"] == 8
    out = train("--resume --out run_finished --steps 8")
    assert "in place of" not in out
    assert "steps=7: must be at least 8 as in run_finished" in train("--resume --out run_finished --steps 7")


def test_a_constant_rate_stays() -> None:
    saved = TrainConfig(steps=10)
    said = "20 steps in place of 10; the learning rate stays 0.001"
    assert lengthened(dataclasses.replace(saved, steps=20), saved, 10) == said
    assert lengthened(saved, saved, 10) is None


# The text elsewhere


def test_the_same_text_at_another_place_is_the_same_run(train, place: Path) -> None:
    shutil.copytree("run_stopped", "twin")
    train("--resume --out twin")
    (place / "moved").mkdir()
    (place / "text.txt").rename(place / "moved" / "plays.txt")
    assert "data='text.txt': must be a readable text file" in train("--resume --out run_stopped")
    train("--resume --out run_stopped --data moved/plays.txt")
    first, second = load_file("twin/model.safetensors"), load_file("run_stopped/model.safetensors")
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    assert json.loads((place / "run_stopped" / "config.json").read_text())["settings"]["data"] == "moved/plays.txt"
    (place / "moved" / "plays.txt").write_text("another text\n" * 30)
    said = train("--resume --out run_stopped")
    assert "error: data='moved/plays.txt': must be " in said
    assert "of the 23 characters that the model knows" in said or "the text that run_stopped was trained on" in said


# From other weights


def first_weights(words: str) -> dict[str, np.ndarray]:
    """The initial weights of a run's learner."""
    config, _, _, free = read_settings([*FEW.split(), *words.split()])
    task = read_task(config, free)
    return make_learner(task.config, task).weights()  # type: ignore[attr-defined]


def as_file(name: str) -> Path:
    return Path(shutil.copy("run_finished/model.safetensors", name))


@pytest.mark.parametrize("form", ["run", "folder", "file"])
def test_a_run_begins_with_the_weights_of_another(place: Path, form: str) -> None:
    """Sizes that are not given are the model's; the learner's weights are the file's, bit for bit."""
    path = {"run": lambda: Path("run_finished"), "file": lambda: as_file("model.safetensors")}.get(
        form, lambda: Path("ours")
    )()
    if form == "folder":
        from jax_moe.porting.checkpoint import save

        save(load(Path("run_finished")), path)
    wanted = load_file("run_finished/model.safetensors")
    found = first_weights(f"--init-from {path}")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    fresh = first_weights("--block-size 4 --model-dim 8 --num-heads 2 --num-layers 2 --num-experts 4")
    assert any((fresh[name] != value).any() for name, value in wanted.items())


def test_pytorch_begins_with_them_too(place: Path) -> None:
    pytest.importorskip("torch", reason="a run of the PyTorch side")
    for name, value in first_weights("--init-from run_finished --framework torch").items():
        np.testing.assert_array_equal(value, load_file("run_finished/model.safetensors")[name], err_msg=name)


def test_a_whole_run_from_other_weights(train, place: Path) -> None:
    """The run says so and starts where the other ended; it is resumed without the other if it has saved anything."""
    as_file("model.safetensors")
    out = train(f"{FEW} --init-from model.safetensors --out new")
    assert "weights from model.safetensors; the optimizer and the learning rate start anew\n" in out
    assert (
        "note: model.safetensors does not store its characters; the sorted characters of this text are assumed\n"
        in out
    )
    last, first = metrics.read(place / "run_finished")[-1], metrics.read(place / "new")[0]
    assert abs(first["val_loss"] - last["val_loss"]) < 0.3, "random weights are far from it"  # measured: 0.04
    (place / "model.safetensors").unlink()
    assert "wrote new" in train("--resume --out new --steps 3")
    shutil.rmtree(place / "new" / "checkpoints")
    (place / "new" / metrics.FILE).unlink()
    assert "init_from='model.safetensors': must be a run" in train("--resume --out new"), "never from random weights"
    assert "init_from='run_stopped': must be 'model.safetensors'" in train("--resume --out new --init-from run_stopped")


def test_fewer_characters_keep_the_model_s_vocabulary(train, place: Path) -> None:
    known = json.loads((place / "run_finished" / "config.json").read_text())["text"]["vocabulary"]
    (place / "text.txt").write_text((known[3] + known[4] + known[5] * 2) * 30)
    train(f"{FEW} --init-from run_finished --out new")
    assert json.loads((place / "new" / "config.json").read_text())["text"]["vocabulary"] == known
    assert load(place / "new").characters == known
    assert "wrote new" in train("--resume --out new")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--init-from run_finished --model-dim 16",
            "must be a model of this run's sizes; model_dim=8 there and 16 here",
        ),
        (
            "--init-from run_finished --num-layers 3 --no-noise",
            "num_layers=2 there and 3 here, noise=True there and False here",
        ),
        (
            "--init-from file.safetensors --data other.txt",
            "vocab_size=23 there and 3 here (the vocabulary here is the text's)",
        ),
        (
            "--init-from run_finished --data foreign.txt",
            "must be of the 23 characters that the model knows; it also has '~'",
        ),
        ("--init-from text.txt", "init_from='text.txt': "),
        ("--init-from empty", "init_from='empty': "),
        ("--init-from soft.safetensors", "init_from='soft.safetensors': must be a makeMoE language model"),
        ("--init-from run_finished --pretrained x", "init_from='run_finished': must be left out with --pretrained"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(train, place: Path, words: str, said: str) -> None:
    as_file("file.safetensors")
    (place / "other.txt").write_text("abc" * 99)
    (place / "foreign.txt").write_text("~" + (place / "text.txt").read_text())
    (place / "empty").mkdir()
    save_file({"phi": np.ones((4, 2, 3), np.float32)}, place / "soft.safetensors")
    error = train(f"{FEW} {words} --out new")
    assert error.startswith("error: ") and said in error
    assert not (place / "new").exists()


# What is shown


def test_a_line_says_that_compilation_has_started(train, place: Path) -> None:
    lines = train("--resume --out run_stopped").splitlines()
    assert lines[1] == "compiling: seconds for a small model, minutes for a large one"
    assert loop.COMPILING not in train("--resume --out run_stopped"), "nothing is left to compile"


def test_one_evaluation_is_a_point(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = metrics.read(place / "run_finished")
    single, all_of_them = plots.loss_figure({"a": rows[:1]}), plots.loss_figure({"a": rows})
    assert [line.get_marker() for line in single.axes[0].get_lines()] == ["o", "o"]
    assert [line.get_marker() for line in all_of_them.axes[0].get_lines()] == ["None", "None"]
    (place / "run_stopped" / metrics.FILE).write_text("")
    monkeypatch.setattr(sys, "argv", ["plots.py", "--compare", "run_stopped", "x.png"])
    assert plots.main() == 2
    assert "run_stopped has none yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        "[]", "7", "null", "[" * 100_000, '{"step": 1}', '{"step": "1"}', '{"step": Infinity}', '{"step": -1}',
        '{"step": true}', ("val_loss", "x"), ("val_loss", None), ("train_loss", []),
        ("expert_load", [[0.5], [0.5, 0.5]]), ("expert_load", []), ("expert_load", [0.5]),
        ("expert_load", [["a"] * 4] * 2), ("dropped_fraction", 0.0),
        ("tokens_per_second", "fast"),
        ("router_entropy", [1.0]),
    ],
)
def test_damaged_metrics_are_one_line(place: Path, damage: str | tuple[str, object]) -> None:
    path = place / "run_finished" / metrics.FILE
    lines = path.read_text().splitlines()
    lines[1] = damage if isinstance(damage, str) else json.dumps({**json.loads(lines[1]), damage[0]: damage[1]})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 2 must be a JSON object with a step and its numbers") as caught:
        metrics.read(place / "run_finished")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    path.write_text("\n".join(lines[:2]))
    assert [row["step"] for row in metrics.read(place / "run_finished")] == [0], "the last line may be cut short"


# A contract that does not fit the weights


@pytest.mark.parametrize("name", ["num_experts", "num_layers", "vocab_size", "block_size", "num_heads"])
def test_a_run_that_claims_a_giant_model_takes_no_memory(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and resuming refuse it: a list of missing names would take gigabytes."""
    path = place / "run_finished" / "config.json"
    about = json.loads(path.read_text())
    for part in ("model", "settings"):
        if name in about[part]:
            about[part][name] = 10**9
    about["model"]["model_dim"] = about["settings"]["model_dim"] = 10**9 if name == "num_heads" else 8
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError) as caught:
        jax_moe.porting.checkpoint.load(place / "run_finished")
    assert len(str(caught.value)) < 5000
    if name in ("num_experts", "num_layers"):
        assert "the contract asks for" in str(caught.value)
    monkeypatch.setattr(sys, "argv", ["train/train.py", "--resume", "--out", "run_finished"])
    assert loop.main() == (0 if name == "vocab_size" else 2)  # what a run resumes from are its settings and its text
