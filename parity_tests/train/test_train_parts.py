"""Schedule, checkpoints, files, plots, signals and devices of training, each without a model."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_moe import sharding
from moe_train import plots
from moe_train.configs.settings import (
    ModelSettings,
    OptimizerSettings,
    Start,
    TrainConfig,
)
from moe_train.learners.optimizer import learning_rate, make_optimizer
from moe_train.run import checkpoint, metrics
from moe_train.run import folder as run_folder
from moe_train.run.interrupt import Interrupt
from moe_train.run.metrics import Evaluation
from moe_train.run.progress import clock

# Optimizer


def test_learning_rate_by_pencil() -> None:
    settings = OptimizerSettings(learning_rate=0.8, warmup_steps=4, decay="cosine", final_learning_rate=0.2)
    rate = learning_rate(settings, 12)
    wanted = [0, 0.2, 0.4, 0.6, 0.8, None, None, None, 0.5, None, None, None, 0.2]
    for step, value in enumerate(wanted):
        if value is not None:
            assert float(rate(step)) == pytest.approx(value, abs=1e-7)
    flat_rate = learning_rate(OptimizerSettings(learning_rate=0.8, warmup_steps=2), 12)
    assert [round(float(flat_rate(step)), 6) for step in (0, 1, 2, 11)] == [0, 0.4, 0.8, 0.8]


def test_first_adamw_step_by_pencil() -> None:
    # Adam's first step: lr * g / (|g| + eps); decay lr * 0.01 * w on every parameter; then (30, 40) clipped to norm 5
    params = {"w": jnp.array([2.0, -3.0])}
    for clip_norm, gradient in ((None, [3.0, 4.0]), (5.0, [30.0, 40.0])):
        optimizer = make_optimizer(OptimizerSettings(eps=1.0, clip_norm=clip_norm), 10, {})
        update, _ = optimizer.update({"w": jnp.array(gradient)}, optimizer.init(params), params)
        new = optax.apply_updates(params, update)["w"]
        wanted = [2 - 1e-3 * (3 / 4 + 0.02), -3 - 1e-3 * (4 / 5 - 0.03)]
        np.testing.assert_allclose(new, wanted, rtol=2e-7)  # measured 8e-8


# Checkpoints


def a_state() -> dict:
    return {"params": {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}, "count": jnp.int32(3)}


def test_checkpoints_come_back_bit_for_bit_and_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        state = jax.tree.map(lambda x, step=step: x + step, a_state())
        checkpoint.save(tmp_path, step, state, {"steps": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.sha256", "30", "30.sha256"]
    step, settings, found = checkpoint.restore(tmp_path, a_state())
    assert (step, settings) == (30, {"steps": 30})
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, a_state(), {})
    wide = {**a_state(), "params": {"a": jnp.zeros((2, 4)), "b": {"c": jnp.ones(4)}}}
    with pytest.raises(ValueError, match=r"must be of this model; params\.a is \(\(2, 3\).*\(\(2, 4\)"):
        checkpoint.restore(tmp_path, wide)
    with pytest.raises(ValueError, match=r"must be of this model; more is None there"):
        checkpoint.restore(tmp_path, {**a_state(), "more": jnp.zeros(3)})


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="has none"):
            checkpoint.restore(folder, a_state())


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    """Every file in turn is cut in half, emptied, changed in its last byte and deleted."""
    checkpoint.save(tmp_path, 5, a_state(), {"x": 1})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 10
    for path in files:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"", content[:-1] + b"~", None):
            if damaged == content:
                continue  # an empty file
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            with pytest.raises(ValueError) as caught:
                checkpoint.restore(tmp_path, a_state())
            message = str(caught.value)
            assert "damaged or cut short" in message or (path.suffix == ".sha256" and "has none" in message)
            assert "\n" not in message
            path.write_bytes(content)
    assert checkpoint.restore(tmp_path, a_state())[0] == 5


def test_a_checkpoint_that_a_crash_cut_off_is_passed_over(tmp_path: Path) -> None:
    for step in (5, 6):
        checkpoint.save(tmp_path, step, a_state(), {})
    (tmp_path / "6.sha256").unlink()
    assert checkpoint.restore(tmp_path, a_state())[0] == 5
    checkpoint.save(tmp_path, 6, a_state(), {})
    assert checkpoint.restore(tmp_path, a_state())[0] == 6


# Run folder


def test_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder.choose(Start()) == Path("runs/001")
    with pytest.raises(ValueError, match="resume=True: must be used with --out"):
        run_folder.choose(Start(resume=True))
    (tmp_path / "runs" / "007").mkdir(parents=True)
    (tmp_path / "runs" / "mine").mkdir()
    assert run_folder.choose(Start()) == Path("runs/008")
    assert run_folder.choose(Start(resume=True)) == Path("runs/007")
    assert run_folder.choose(Start(out="x")) == Path("x")


def test_a_folder_is_claimed_only_if_it_is_free(tmp_path: Path) -> None:
    folder, lock = run_folder.claim(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match=r"b': is being written by another process"):
        run_folder.claim(tmp_path / "a" / "b")
    lock.release()
    assert run_folder.claim(tmp_path / "a" / "b")[0] == folder
    (folder / ".lock").unlink()  # the second lock is left as a killed process leaves it
    (folder / ".lock").touch()
    (folder / ".config.json.part").touch()
    _, lock = run_folder.claim(folder)
    (folder / ".config.json.part").unlink()
    run_folder.release(folder, lock)
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "a" / "file").write_text("kept")
    with pytest.raises(ValueError, match="must be new or empty; it holds no run"):
        run_folder.claim(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must be new or empty; --resume"):
        run_folder.claim(tmp_path / "a")
    for out in (tmp_path / "a" / "file", tmp_path / "a" / "file" / "x"):
        with pytest.raises(ValueError, match="must be a folder that can be written"):
            run_folder.claim(out)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"file", "config.json"}


def test_a_number_that_is_taken_meanwhile(tmp_path: Path) -> None:
    found = [run_folder.claim(tmp_path / "runs" / "009", numbered=True)[0].name for _ in range(3)]
    assert found == ["009", "010", "011"]


def test_what_a_resumed_run_may_change() -> None:
    saved = TrainConfig()
    run_folder.check_same(dataclasses.replace(saved, logger="mlflow", steps=6000, sample_length=1), saved, Path("r"))
    for change in ({"steps": 4000}, {"seed": 1}, {"model": ModelSettings(num_layers=3)}):
        with pytest.raises(ValueError, match="which --resume continues"):
            run_folder.check_same(dataclasses.replace(saved, **change), saved, Path("r"))
    decays = dataclasses.replace(saved, optimizer=OptimizerSettings(decay="cosine"))
    run_folder.check_same(dataclasses.replace(decays, steps=6000, data="elsewhere.txt"), decays, Path("r"))
    with pytest.raises(ValueError, match="steps=10: must be at least 5000 as in r, which --resume continues"):
        run_folder.check_same(dataclasses.replace(decays, steps=10), decays, Path("r"))


def a_row(step: int, L: int = 3, E: int = 4) -> metrics.Row:
    random = np.random.default_rng(step)
    load_LE = random.dirichlet(np.ones(E), L)
    evaluation = Evaluation(3.0 / (step + 1), [0.1] * L, load_LE.tolist(), [1.0] * L, [1.0] * L)
    return metrics.make_row(step, evaluation, dataclasses.replace(evaluation, loss=evaluation.loss + 0.1), 1000.0)


def test_metrics_survive_a_cut_last_line_and_forget_what_is_run_again(tmp_path: Path) -> None:
    rows = [a_row(step) for step in (0, 5, 10)]
    for row in rows:
        metrics.append(tmp_path, row)
    assert metrics.read(tmp_path) == rows
    path = tmp_path / metrics.FILE
    path.write_text(path.read_text()[:-30])
    assert metrics.read(tmp_path) == rows[:2]
    metrics.rewrite(tmp_path, metrics.read_until(tmp_path, 4))
    assert rows[:1] == metrics.read(tmp_path)
    path.write_text("{\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="line 1 must be a JSON object"):
        metrics.read(tmp_path)


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for step in (0, 5, 10):
            metrics.append(tmp_path / name, a_row(step))
    plots.plot_run(tmp_path / "one", metrics.read(tmp_path / "one"))
    plots.plot_run(tmp_path / "one", metrics.read(tmp_path / "one")[:1])  # a run stopped at once has one row
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots.py", "--compare", "one", "two", "both.png"])
    assert plots.main() == 0
    for path in ("one/loss.png", "one/expert_load.png", "both.png"):
        assert (tmp_path / path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"loss.png", "expert_load.png", metrics.FILE}
    for words, message in ((["one", "three", "x.png"], "three"), (["one", "two"], "ends in .png")):
        monkeypatch.setattr(sys, "argv", ["plots.py", "--compare", *words])
        assert plots.main() == 2
        assert message in capsys.readouterr().err
    figure = plots.loss_figure({name: metrics.read(tmp_path / name) for name in ("one", "two")})
    drawn = [line.get_ydata() for line in figure.axes[0].get_lines()]
    np.testing.assert_allclose(drawn[1], [3.1, 0.6, 3 / 11 + 0.1], rtol=1e-12)
    image = plots.load_figure([a_row(0), a_row(5)]).axes[2].collections[0].get_array()
    np.testing.assert_allclose(2 ** np.asarray(image)[:, 1] / 4, a_row(5)["expert_load"][2], rtol=1e-12)


def test_clock() -> None:
    assert [clock(0.4), clock(65), clock(3661)] == ["0:00", "1:05", "1:01:01"]


# Signals and devices


@pytest.mark.parametrize("number", Interrupt.SIGNALS)
def test_the_first_signal_is_a_request_and_the_second_acts(number: int) -> None:
    class OuterError(Exception):
        pass

    def outer(*_: object) -> None:
        raise OuterError

    before = signal.signal(number, outer)
    try:
        with Interrupt() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            with pytest.raises(OuterError):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is outer
    finally:
        signal.signal(number, before)


def test_devices() -> None:
    assert [sharding.fitting_devices(16, n) for n in (1, 3, 5, 8, 100)] == [1, 2, 4, 8, 16]
    count = jax.local_device_count()
    with pytest.raises(ValueError, match=f"num_devices={count + 1}: must be 1 to {count}"):
        sharding.data_mesh(count + 1)
    batch = sharding.put_batch(np.arange(6).reshape(3, 2), sharding.data_mesh(1))
    np.testing.assert_array_equal(batch, np.arange(6).reshape(3, 2))
