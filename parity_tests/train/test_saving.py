"""Checkpoints that are written while the run goes on: their bits, their end, their errors, and which of them stay."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_moe.sharding.mesh import data_mesh
from moe_train import loop
from moe_train.configs.settings import TrainConfig, check
from moe_train.run import checkpoint, metrics
from moe_train.run import folder as run_folder
from moe_train.run.keep import Keep, best_row
from moe_train.run.saving import Saving
from moe_train.run.together import ALONE, AgreedError, Processes
from parity_tests.train.test_train_run import CountingLearner, a_run

ROOT = Path(__file__).parents[2]
LENGTH = 1 << 18


def nothing() -> None:
    """Does nothing."""


@partial(jax.jit, donate_argnums=0)
def step(state: Any) -> Any:
    """Another state of the same shapes, in the same memory if it may be."""
    return jax.tree.map(lambda x: x * 3 + 1, state)


def test_the_bits_are_those_of_the_step_that_was_saved(tmp_path: Path) -> None:
    """Steps go on in memory of their own, as what is being written is not donated to them; then donation goes on."""
    check_bits(tmp_path, 1)


def test_the_bits_on_two_devices(tmp_path: Path) -> None:
    """In a process that has them."""
    code = f"from parity_tests.train import test_saving as t; t.check_bits(t.Path({str(tmp_path)!r}), 2)"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def check_bits(tmp_path: Path, devices: int) -> None:
    """Raises unless the checkpoint that is written while steps go on has the bits of the one written before."""
    split = NamedSharding(data_mesh(devices), PartitionSpec("data"))
    state = {"w": jax.device_put(jnp.arange(LENGTH, dtype=jnp.float32), split), "count": jnp.int32(7)}
    state = step(state)
    wanted = jax.tree.map(lambda x: np.array(x), state)
    checkpoint.save(tmp_path / "now", 1, state, {"seed": 1})
    places = addresses(state)
    saving = checkpoint.begin(tmp_path / "later", 1, state, {"seed": 1})
    for _ in range(3):
        state = step(state)
        assert not places & addresses(state), "a step wrote to what was being saved"
    saving.wait()
    for folder in ("now", "later"):
        like = jax.tree.map(jnp.zeros_like, state)
        number, settings, found = checkpoint.restore(tmp_path / folder, like)
        assert (number, settings) == (1, {"seed": 1})
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    del saving
    places = addresses(state)
    assert addresses(step(state)) == places, "donation does not reuse memory here: the test above would prove nothing"


def addresses(state: Any) -> set[int]:
    """Where the parts of the arrays are."""
    leaves = jax.tree.leaves(state["w"])
    return {shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards}


# The loop, with a learner whose checkpoints are files that end when they are told to


class Slow(CountingLearner):
    """Its checkpoints are empty files, each written when `go` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.go: Callable[[int], None] = lambda step: None
        self.writing = 0

    def save(self, folder: Path, step: int, settings: dict[str, Any], keep: Keep) -> Saving:  # type: ignore[override]
        super().save(folder, step, settings, keep)
        assert self.writing == 0, "one checkpoint at a time"
        self.writing += 1
        folder.mkdir(exist_ok=True)

        def write() -> None:
            self.go(step)
            (folder / f"{step}.sha256").touch()
            for old in keep.removable(checkpoint.saved_steps(folder)):
                (folder / f"{old}.sha256").unlink()
            self.writing -= 1

        return Saving([write], ALONE, nothing)


def slow_run(folder: Path, **changes: Any) -> tuple[loop.Run, Slow]:
    """A run of ten steps, saved every four."""
    run, learner = a_run(folder, **changes), Slow()
    run.learner = learner
    return run, learner


def test_steps_go_on_until_the_next_checkpoint_is_due(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first is written only when seven steps are done; the run's end waits for the last."""
    run, learner = slow_run(tmp_path / "run")
    seven = threading.Event()
    learner.on_step = lambda step: seven.set() if step == 6 else None
    learner.go = lambda step: None if seven.wait(30) else pytest.fail("the steps did not go on")
    assert loop.train(run) == 0
    assert learner.saved == [4, 8, 10] and run_folder.saved_steps(run.folder) == [8, 10]
    out = capsys.readouterr().out
    assert "checkpoints: 3; training stood still 0.0" in out and " s at the end until the last was whole\n" in out


def test_without_async_no_step_is_taken_meanwhile(tmp_path: Path) -> None:
    run, learner = slow_run(tmp_path / "run", async_checkpoints=False)
    learner.go = lambda step: None if learner.steps == step else pytest.fail("a step was taken")
    assert loop.train(run) == 0
    assert run_folder.saved_steps(run.folder) == [8, 10]


@pytest.mark.parametrize("number", [4, 8, 10])
def test_an_error_of_the_writer_is_one_line(tmp_path: Path, number: int, monkeypatch, capsys) -> None:
    """At the next step, at the next checkpoint or at the end; the checkpoint before it stays."""
    run, learner = slow_run(tmp_path / "run")

    def go(step: int) -> None:
        if step == number:
            raise OSError(28, "No space left on device", "there")

    learner.go = go
    monkeypatch.setattr(loop, "read_settings", lambda arguments: ())
    monkeypatch.setattr(loop, "prepare", lambda: run)
    assert loop.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there: cannot be written (No space left on device)") and error.count("\n") == 1
    before = [step for step in (4, 8) if step < number]
    assert run_folder.saved_steps(run.folder) == before
    assert "no checkpoint was saved" in error if not before else f"of step {before[-1]}" in error


def test_another_error_waits_for_the_checkpoint(tmp_path: Path) -> None:
    """The loss diverges while a checkpoint is written: it becomes whole."""
    run, learner = slow_run(tmp_path / "run")
    diverged = threading.Event()

    def on_step(step: int) -> None:
        if step == 5:
            learner.loss = float("nan")
            diverged.set()

    learner.on_step, learner.go = on_step, lambda step: None if diverged.wait(30) else pytest.fail("never")
    with pytest.raises(loop.DivergedError):
        loop.train(run)
    assert run_folder.saved_steps(run.folder) == [4]
    run.lock.release()


# Several processes


def assert_set(event: threading.Event) -> None:
    """Waits for the event."""
    assert event.wait(30)


def test_a_stage_begins_when_all_have_ended_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    others, seen = "running", []
    monkeypatch.setattr(Processes, "gather", lambda self, text: [text, others])
    first = threading.Event()
    saving = Saving([first.set, lambda: seen.append(2)], Processes(2, 0), nothing)
    assert first.wait(30)
    assert not saving.whole(1) and seen == []
    others = ""
    assert not saving.whole(30), "the second stage begins now"
    assert saving.whole(30) and seen == [2]


def test_a_failure_in_one_process_is_heard_by_one_that_still_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for its own thread, which waits at a barrier of Orbax's for the process that failed."""
    undone, barrier = [], threading.Event()
    saving = Saving([lambda: assert_set(barrier)], Processes(2, 0), lambda: undone.append(1))
    said = iter([["running", "failed"], ["", '[false, "there: cannot be written (full)"]']])
    monkeypatch.setattr(Processes, "gather", lambda self, text: next(said))
    with pytest.raises(AgreedError, match=r"^process 1: there: cannot be written \(full\)$") as caught:
        saving.whole()
    barrier.set()
    assert caught.value.status == 1 and undone == [1]


# Which checkpoints stay


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    """At every step of a run, with losses that fall and rise; a step without an evaluation is never the best."""
    losses = {2: 3.0, 4: 1.5, 6: 2.0, 8: 1.5, 10: 2.5}
    run, learner = slow_run(tmp_path / "run", eval_every=2, checkpoint_every=2, keep_checkpoints=1, keep_best=True)

    def evaluate(step: int, use: str, batches: Any) -> metrics.Evaluation:
        list(batches)
        return metrics.Evaluation(losses.get(step, 9.0), [0.0], [[0.5, 0.5]], [0.5], [1.0])

    learner.evaluate = evaluate  # type: ignore[method-assign]
    newest: list[int] = []

    def on_step(step: int) -> None:
        there = run_folder.saved_steps(run.folder)
        record = run.folder / "best.json"
        if record.exists():
            best = json.loads(record.read_text())
            assert best["step"] in there and best["val_loss"] == losses[best["step"]]
        newest.append(max(there, default=0))

    learner.on_step = on_step
    assert loop.train(run) == 0
    assert run_folder.saved_steps(run.folder) == [4, 10]
    assert json.loads((run.folder / "best.json").read_text()) == {"step": 4, "val_loss": 1.5}
    assert newest == sorted(newest)


def test_the_best_of_rows() -> None:
    losses = {0: 0.5, 2: 3.0, 4: float("nan"), 6: 1.0, 8: 1.0}
    rows = [{"step": step, "val_loss": loss} for step, loss in losses.items()]
    assert best_row([2, 4, 6, 8], rows) == rows[3], "the earlier of equal ones, of those that were saved"
    assert best_row([4], rows) is None and best_row([], rows) is None
    assert Keep(2, 1).removable([1, 2, 3, 4, 5]) == [2, 3] and Keep(3).removable([1, 2]) == []


def test_settings_that_are_refused() -> None:
    for changes, said in (
        ({"keep_checkpoints": 0}, "keep_checkpoints=0: must be at least 1"),
        ({"keep_best": True, "checkpoint_every": 150}, "checkpoint_every=150: must be a multiple of eval_every=100"),
    ):
        with pytest.raises(ValueError) as caught:
            check(dataclasses.replace(TrainConfig(), **changes))
        assert said in str(caught.value)
