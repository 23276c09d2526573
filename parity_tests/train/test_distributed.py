"""Several processes on this machine train as one does, go on from each other's checkpoints, and fail together."""

import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import distributed
from benchmarks.distributed import ends, free_port, launched, start
from jax_moe.sharding.mesh import device_mesh, read_mesh
from moe_train import loop
from moe_train.configs.launch import Launch, check_launch
from moe_train.data import text as data
from moe_train.run import metrics, together

pytestmark = pytest.mark.usefixtures("quick")
TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(60))
WORDS = (
    "--data text.txt --steps 4 --eval-every 2 --eval-batches 1 --checkpoint-every 2 --batch-size 4 --num-layers 1 "
    "--model-dim 8 --num-heads 2 --num-experts 4 --block-size 8 --warmup-steps 1 --sample-length 2 "
    "--balance-loss-weight 0.01"
)
SETTINGS = WORDS.split()
SAME = 1e-6  # of losses, relative; measured: 1.1e-7
Ended = list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text.txt").write_text(TEXT)
    return folder


def alone(place: Path, *words: str) -> None:
    """Trains in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["train/train.py", *words, "--mesh", "data=1"])
        assert loop.main() == 0


def both(place: Path, *words: str) -> Ended:
    """Runs the command in two processes; what they print and how they end."""
    return ends((start(launch, place, flags=flags()) for launch in launched(2, free_port(), words)), timeout=300)


def flags() -> str:
    """Those of the tests, without a number of devices."""
    return " ".join(word for word in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in word)


@pytest.fixture(scope="module")
def one(place: Path, quick: None) -> Path:
    """The run in one process."""
    alone(place, *SETTINGS, "--out", "one")
    return place / "one"


@pytest.fixture(scope="module")
def two(place: Path, quick: None) -> Path:
    """The same run in two processes, on the mesh data=2."""
    (status, out, error), (other_status, other_out, other_error) = both(place, *SETTINGS, "--out", "two")
    assert (status, error, other_status, other_out, other_error) == (0, "", 0, "", ""), "process 0 alone prints"
    assert "2 of 2 cpu devices in 2 processes" in out and "wrote two" in out
    return place / "two"


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "model.safetensors")


def same_curve(first: Path, second: Path) -> None:
    """Raises unless steps, drops and loads are the same, and losses and weights but for rounding."""
    assert distributed.largest_difference(metrics.read(first), metrics.read(second)) < SAME
    for name, value in weights(first).items():
        np.testing.assert_allclose(weights(second)[name], value, rtol=0, atol=5e-7, err_msg=name)  # measured: 6e-8


def test_two_processes_train_as_one(one: Path, two: Path) -> None:
    same_curve(one, two)
    names = {path.relative_to(one).parts[0] for path in one.rglob("*")}
    assert {path.relative_to(two).parts[0] for path in two.rglob("*")} == names
    assert (one / "sample.txt").read_text() == (two / "sample.txt").read_text()


def test_one_process_goes_on_from_two_exactly(two: Path) -> None:
    """A run that is resumed at its end writes its weights: those of the checkpoint, bit for bit."""
    there = shutil.copytree(two, two.with_name("there"))
    (there / "model.safetensors").unlink()
    alone(two.parent, "--resume", "--out", "there")
    for name, value in weights(two).items():
        np.testing.assert_array_equal(weights(there)[name], value, err_msg=name)


def test_two_processes_go_on_from_one_with_experts_between_them(one: Path) -> None:
    """The last checkpoint is lost: both train from the one before, on the mesh expert=2."""
    here = shutil.copytree(one, one.with_name("here"))
    shutil.rmtree(here / "checkpoints" / "4")
    (here / "checkpoints" / "4.sha256").unlink()
    ended = both(one.parent, "--resume", "--out", "here", "--mesh", "expert=2", "--exchange", "padded")
    assert [status for status, _, _ in ended] == [0, 0], ended
    same_curve(one, here)


def test_a_share_that_is_read_twice_is_found(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if process 1 read the sequences of process 0."""
    read = data.batch

    def twice(*values, **kwargs) -> np.ndarray:
        tokens_BT1 = read(*values, **kwargs)
        return np.concatenate([tokens_BT1[: len(tokens_BT1) // 2]] * 2)

    monkeypatch.setattr(data, "batch", twice)
    alone(one.parent, *SETTINGS, "--out", "twice")
    with pytest.raises((AssertionError, ValueError)):
        same_curve(one, one.with_name("twice"))


@pytest.mark.parametrize(
    ("loss", "held", "wrong"), [(4e-7, 1_000_008, False), (5e-6, 1_000_008, True), (0.0, 1_000_200, True)]
)
def test_what_counts_as_a_difference(loss: float, held: int, wrong: bool) -> None:
    runs = {1: {"largest_difference": 0.0, "memory": None}}
    runs[2] = {"largest_difference": loss, "memory": [1_000_000, held]}
    assert distributed.differs({"models": {"mixtral": runs}}) == wrong


def test_a_share_of_a_batch() -> None:
    """The sequences that are asked for are those of the whole batch."""
    text = data.tokenize(TEXT, "here", 8)
    whole, rows = data.batch(text, 1, "train", 3, 6, 8), np.asarray([4, 1])
    np.testing.assert_array_equal(data.batch(text, 1, "train", 3, 6, 8, rows=rows), whole[rows])


# What goes wrong


def fail(place: Path, *launches: list[str], timeout: float = 120) -> Ended:
    """Runs the commands, each of which must fail in one line or none, and write nothing."""
    ended = ends((start(words, place, flags=flags()) for words in launches), timeout)
    for status, out, error in ended:
        assert status == 2 and error.count("\n") <= 1 and "Traceback" not in error, (status, out, error)
    assert not (place / "bad").exists()
    return ended


BAD = [*SETTINGS, "--out", "bad"]


def test_others_that_never_come(place: Path) -> None:
    """Process 0 waits for process 1 at one port, process 1 for process 0 at another."""
    ports = [free_port(), free_port()]
    words = [[*launched(2, port, BAD)[index], "--coordinator-timeout", "2"] for index, port in enumerate(ports)]
    what = "must be reached by all 2 processes within coordinator_timeout=2 seconds; start them all, or wait longer"
    for port, (_, _, error) in zip(ports, fail(place, *words), strict=True):
        assert error == f"error: coordinator='127.0.0.1:{port}': {what}\n"


def test_processes_that_disagree(place: Path) -> None:
    first, second = launched(2, free_port(), BAD)
    (_, _, error), (_, _, silent) = fail(place, first, [*second, "--seed", "3", "--learning-rate", "0.5"])
    assert error.startswith("error: processes 0 and 1 must be started with the same settings: ") and silent == ""
    assert "learning_rate=0.003 and 0.5" in error and "seed=1337 and 3" in error


def test_one_process_that_cannot_start_ends_both(place: Path) -> None:
    first, second = launched(2, free_port(), BAD)
    (_, _, error), (_, _, silent) = fail(place, first, [*second, "--learning-rate", "-1"])
    assert error == "error: process 1: learning_rate=-1.0: must be above 0\n" and silent == ""


def test_a_mesh_that_is_not_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process would see the same; a process without a device of the mesh could not take part."""
    count = jax.device_count()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for words in (f"data={count + 1}", "data=1" if count > 1 else "data=2,expert=3"):
        with pytest.raises(ValueError, match=f"mesh='{words}': must be of {count} devices in all, those of the 2 proc"):
            device_mesh(read_mesh(words))


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch("a:1", 2, 2), "process_id=2: must be 0 to 1, as --processes=2"),
        (Launch("a:1", 2, -1), "process_id=-1: must be 0 to 1"),
        (Launch("a:1", 0, 0), "processes=0: must be at least 1"),
        (Launch("a:1", 2), "process_id=None: must be given with --coordinator"),
        (Launch("a:1", None, 0), "processes=None: must be given with --coordinator"),
        (Launch("a", 2, 0), "coordinator='a': must be HOST:PORT of process 0, such as 10.0.0.1:1234"),
        (Launch("a:0", 2, 0), "coordinator='a:0': must be HOST:PORT"),
        (Launch("a:99999", 2, 0), "coordinator='a:99999': must be HOST:PORT"),
        (Launch(processes=2), "processes=2: must be left out without --coordinator HOST:PORT"),
        (Launch(process_id=2), "process_id=2: must be left out without --coordinator HOST:PORT"),
        (Launch("a:1", 2, 0, distributed=True), "distributed=True: must be left out with --coordinator"),
        (Launch("a:1", 2, 0, coordinator_timeout=0), "coordinator_timeout=0: must be at least 1 second"),
    ],
)
def test_launches_that_are_refused(launch: Launch, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_launch(launch)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--coordinator a:1 --processes 2 --process-id 7", "process_id=7: must be 0 to 1, as --processes=2"),
        ("--num-processes 2", "--num-processes: is --processes here"),
        ("--coordinator-address a:1", "--coordinator-address: is --coordinator here"),
    ],
)
def test_options_that_are_refused(place: Path, words: str, said: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train/train.py", *BAD, *words.split()])
    assert loop.main() == 2
    assert said in capsys.readouterr().err


def test_a_signal_to_any_process_ends_all_at_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = [""]
    monkeypatch.setattr(together.Processes, "gather", lambda self, text: [text, heard[0]])
    with together.InterruptOfAny(together.Processes(2, 0)) as stop:
        stop.meet()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.requested, "the others do not know of it yet"
        stop.meet()
        assert stop.requested
    with together.InterruptOfAny(together.Processes(2, 0)) as stop:
        heard[0] = "yes"
        stop.meet()
        assert stop.requested


def test_a_failure_in_one_is_one_message_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the first process that fails, with its number unless it is process 0; nothing for one process."""
    sides = [together.Processes(3, index) for index in range(3)]

    def refuse() -> None:
        raise ValueError("seed=-1: must be\n0 or above")

    monkeypatch.setattr(together.Processes, "gather", lambda self, text: ["", text, text])
    for side in sides:
        with pytest.raises(together.AgreedError, match=r"^process 1: seed=-1: must be 0 or above$") as caught:
            side.everywhere(refuse)
        assert caught.value.status == 2
    with pytest.raises(ValueError, match="must be\n0"):
        together.Processes().everywhere(refuse)
    monkeypatch.setattr(together.Processes, "gather", lambda self, text: [text] * 3)
    assert [side.everywhere(lambda: 5) for side in sides] == [5, 5, 5]
    assert [side.alone(lambda: 5) for side in sides] == [5, None, None]
