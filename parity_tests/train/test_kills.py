"""Some kills (`make kills`: more): a training run ends as if never killed, and a port leaves one complete target.

Each kill is at a moment drawn from a seed, most of them while a checkpoint or the target is being written.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.distributed import free_port, launched
from jax_moe.porting.checkpoint import load
from jax_moe.porting.formats.state_file import write_state
from moe_train.run import checkpoint
from moe_train.run import folder as run_folder
from parity_tests.shared.zygote import NEVER, Done, Zygote
from parity_tests.train.test_train_run import TEXT, numbers

KILLS = int(os.environ.get("KILLS", "5"))
STEPS = KILLS + 4  # a kill comes before the second checkpoint that is written after a start
SETTINGS = (
    f"--data text.txt --steps {STEPS} --eval-every 50 --eval-batches 1 --checkpoint-every 1 --batch-size 4 "
    "--num-layers 1 --model-dim 8 --num-heads 1 --num-experts 2 --block-size 4 --warmup-steps 2 --sample-length 4"
).split()


KILLS_OF_TWO = int(os.environ.get("KILLS_OF_TWO", "0"))
STEPS_OF_TWO = 3 * KILLS_OF_TWO + 8  # each kill is before the third checkpoint after a start
HEARTBEAT = 10  # seconds that a process waits for a sign of life of the other where it hears of its end in no other way
SETTINGS_OF_TWO = [
    *SETTINGS, "--steps", str(STEPS_OF_TWO), "--checkpoint-every", "2", "--heartbeat-timeout", str(HEARTBEAT)
]
LATEST = (300, 30)  # of a kill, in moments of process 0 and of process 1; a save has about 110 and 10
BOUND = HEARTBEAT + 20  # seconds in which the other process ends


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Zygote]:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "text.txt").write_text(TEXT)
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    with Zygote(tmp_path / "work", "moe_train.loop:main", environment) as zygote:
        yield zygote


def test_a_training_run(runs: Zygote) -> None:
    assert runs.run(*SETTINGS, "--out", "whole").status == 0
    whole, killed = runs.folder / "whole", runs.folder / "killed"
    draw, newest, words = np.random.default_rng(7), 0, [*SETTINGS, "--out", "killed"]
    for _ in range(KILLS):
        done = runs.run(*words, kill_at=int(draw.integers(1, 160)))
        assert done.status == -9, done.printed
        steps = run_folder.saved_steps(killed)
        assert max(steps, default=0) >= newest, "a checkpoint was lost"
        newest = max(steps, default=0)
        for step in steps:
            checkpoint.check_whole(killed / "checkpoints", step)
        words = ["--resume", "--out", "killed"] if (killed / "config.json").exists() else words
    done = runs.run(*words)
    assert done.status == 0, done.printed
    assert 0 < newest < STEPS
    assert numbers(whole) == numbers(killed)
    for name in ("model.safetensors", "sample.txt"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    kept = {path.name for path in (whole / "checkpoints").iterdir()}
    assert kept == {path.name for path in (killed / "checkpoints").iterdir()}
    hidden = [path.name for path in killed.iterdir() if path.name.startswith(".")]
    assert hidden == [], hidden


@pytest.mark.skipif(not KILLS_OF_TWO, reason="`make kills` kills one of two processes: a minute for the first")
def test_one_of_two_processes(runs: Zygote) -> None:
    """The other process ends too, soon, and says which checkpoint is safe; both then go on from it."""

    def both(words: list[str], kill_at: tuple[int, int] = (NEVER, NEVER)) -> list[Done]:
        return runs.together(launched(2, free_port(), words), kill_at)

    assert [done.status for done in both([*SETTINGS_OF_TWO, "--out", "whole"])] == [0, 0]
    whole, killed = runs.folder / "whole", runs.folder / "killed"
    draw, newest, words = np.random.default_rng(5), 0, [*SETTINGS_OF_TWO, "--out", "killed"]
    for _ in range(KILLS_OF_TWO):
        victim = int(draw.integers(2))
        moment = int(draw.integers(1, LATEST[victim]))
        ended = both(words, (moment, NEVER) if victim == 0 else (NEVER, moment))
        dead, other = ended[victim], ended[1 - victim]
        assert dead.status == -9, ended
        assert other.seconds - dead.seconds < BOUND
        ended_by_jax = other.status == -6  # process 0 has died, or process 1 before they had connected: jax aborts
        said = [line for line in other.printed.splitlines() if line.startswith("error: ")]
        assert ended_by_jax or (other.status == 1 and len(said) == 1), other
        assert ended_by_jax or said[0].startswith("error: a process has ended or failed, the others cannot go"), other
        assert "Traceback" not in other.printed
        steps = run_folder.saved_steps(killed)
        print(f"process {victim} at {moment}: {other.status}, {other.seconds - dead.seconds:.2f} s later; {steps}")
        assert max(steps, default=0) >= newest, "a checkpoint was lost"
        newest = max(steps, default=0)
        for step in steps:
            checkpoint.check_whole(killed / "checkpoints", step)
        if (killed / "config.json").exists():
            words = ["--resume", "--out", "killed", "--heartbeat-timeout", str(HEARTBEAT)]
    ended = both(words)
    assert [done.status for done in ended] == [0, 0], ended
    assert newest < STEPS_OF_TWO and numbers(whole) == numbers(killed)
    for name in ("model.safetensors", "sample.txt"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    kept = {path.name for path in (whole / "checkpoints").iterdir()}
    assert kept == {path.name for path in (killed / "checkpoints").iterdir()}


@pytest.mark.parametrize("to", ["orbax", "file"])
def test_a_port(to: str, tmp_path: Path) -> None:
    """Some kills come while an older target is replaced: the old or the new target exists after the next port."""

    (tmp_path / "work").mkdir()
    state = {key: np.asarray(value) for key, value in _weights().items()}
    write_state(tmp_path / "work" / "from.safetensors", state)
    name = {"orbax": "target", "file": "target.safetensors"}[to]
    words = ["port", "from.safetensors", name, *(["--to", "orbax"] if to == "orbax" else [])]
    draw, target = np.random.default_rng(8), tmp_path / "work" / name
    with Zygote(tmp_path / "work", "moe_cli.main:main", {}) as zygote:
        moments = zygote.run(*words).moments
        for number in range(KILLS if to == "orbax" else KILLS // 2):
            again = ["--overwrite"] if target.exists() or number % 2 else []
            done = zygote.run(*words, *again, kill_at=int(draw.integers(1, moments)))
            assert done.status == -9, done.printed
            if not again and target.exists():
                target.rename(tmp_path / f"away{number}")
        done = zygote.run(*words, "--overwrite")
        assert done.status == 0, done.printed
        assert {path.name for path in (tmp_path / "work").iterdir()} == {"from.safetensors", name}
    read = load(target).state()
    assert read.keys() == state.keys() and all(np.array_equal(read[key], state[key]) for key in state)


def _weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    E, D, F = 2, 8, 16
    state = {"gate.weight": draw.normal(size=(E, D))}
    for expert in range(E):
        for part, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
            state[f"experts.{expert}.{part}.weight"] = draw.normal(size=shape)
    return {key: value.astype(np.float32) for key, value in state.items()}
