"""Killed at twenty moments, started twice at once, a disk that takes no more, a folder that goes: nothing lost, one line said."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jax_moe.cli import main
from jax_moe.porting import files
from jax_moe.porting.files import check_target, writing
from parity_tests.commands import ROOT, fails, names
from train import loop

KILLS = int(os.environ.get("KILLS", "20"))
TEXT = "\N{WINKING FACE} To be, or not to be, that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 6
SETTINGS = (
    "--data text.txt --block-size 4 --batch-size 4 --eval-every 2 --eval-batches 1 --checkpoint-every 1 --sample-length 4 "
    "--steps 6 --warmup-steps 1 --model-dim 8 --num-heads 2 --num-layers 1 --num-experts 2"
)
RUN = SETTINGS.split()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return tmp_path


def killed(kind: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The attempts of `python -m parity_tests.killed`."""
    command = [sys.executable, "-m", "parity_tests.killed", kind, str(folder), str(KILLS), "7", "--", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["status"] for one in found} == {0, -signal.SIGALRM}
    assert sum(one["status"] != 0 for one in found) >= KILLS
    return found


def test_a_training_run_killed_and_resumed_ends_as_if_it_never_was(place: Path) -> None:
    first, *others = [one["files"] for one in killed("train", place / "it", *RUN) if one["status"] == 0]
    assert first["run/model.safetensors"] and first["losses"].count("], [") == 3
    assert all(one == first for one in others)


def test_an_orbax_port_killed_leaves_the_old_or_the_new(whole: Path, tmp_path: Path) -> None:
    """And nothing else, once a port to the same target has ended."""
    found = killed("port", tmp_path / "it", "port", str(whole), "--to", "orbax")
    assert {one["files"].get("target", "absent") for one in found} == {"whole", "absent"}
    assert names(tmp_path / "it") == {"target"}


def test_what_was_replaced_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".it.0123abcd.part.old").mkdir()
    (tmp_path / ".it.0123abcd.part").mkdir()
    (tmp_path / ".it.lock").touch()
    with pytest.raises(ValueError, match="exists already"), writing(tmp_path / "it", overwrite=False):
        pass
    assert names(tmp_path) == {"it"}


def test_two_ports_to_one_target(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with writing(tmp_path / "target", overwrite=False) as part:
        for to in ("orbax", "hf"):
            assert "another process is writing it" in fails(capsys, "port", whole, tmp_path / "target", "--to", to)
        part.mkdir()
        (part / "mine").touch()
    assert names(tmp_path) == {"target"} and names(tmp_path / "target") == {"mine"}


def test_the_second_of_two_ports_finds_what_the_first_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looked before the first had finished, and looks again once it holds the target."""
    looked: list[Path] = []

    def look(path: Path, *rest: Any) -> None:
        looked.append(path)
        if len(looked) == 1:
            path.write_text("first")  # between the two looks
        else:
            check_target(path, *rest)

    monkeypatch.setattr(files, "check_target", look)
    with pytest.raises(ValueError, match="exists already"), writing(tmp_path / "target", overwrite=False):
        pass
    assert (tmp_path / "target").read_text() == "first"


def script(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    """`train.py` with the learner made of additions, in a process of its own."""
    code = "import sys, runpy\nfrom parity_tests.killed import Adder\nfrom train import loop\nloop.make_learner = Adder\n"
    code += f"{before}\nsys.argv = {[str(ROOT / 'train' / 'train.py'), *arguments]!r}\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def test_two_runs_started_together_are_two_folders(place: Path) -> None:
    runs = [script(*RUN) for _ in range(2)]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]  # the terminal has no emoji: the sample is written all the same
    assert names(place / "runs") == {"001", "002"} and sorted(text.split()[-1] for text in said) == ["runs/001", "runs/002"]
    for number in ("001", "002"):
        assert (place / "runs" / number / "model.safetensors").exists() and ".lock" not in names(place / "runs" / number)


def test_resume_beside_the_running_run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *RUN, "--out", "run"])
    run = loop.prepare(*loop.read_settings(sys.argv[1:]))
    for words in (["--resume", "--out", "run"], [*RUN, "--out", "run"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        assert loop.main() == 2
        assert capsys.readouterr().err == "error: out='run': another run is writing it: must be another folder\n"
    assert run.held is not None and run.held.holds()
    run.held.release()


def test_a_disk_that_takes_no_more_is_one_line_and_an_end(place: Path) -> None:
    """A limit on a file's size stands for it: it needs no rights, and fails inside Orbax as a full disk does."""
    before = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nsave = Adder.save\n"
        "def limited(self, folder, step, settings):\n"
        "    if step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))\n"
        "    save(self, folder, step, settings)\nAdder.save = limited"
    )
    done = script(*RUN, "--out", "run", before=before)
    _, error = done.communicate(timeout=120)
    assert done.returncode == 1 and error.count("\n") == 1, error
    assert error.startswith("error: step 3 could not be saved (")
    assert error.endswith("last good checkpoint is run/checkpoints/2\n")
    again = script("--resume", "--out", "run")
    assert again.communicate()[1] == "" and again.returncode == 0


def test_a_first_save_that_failed_can_be_resumed_from_the_start(place: Path) -> None:
    done = script(*RUN, "--out", "run", before="import os, signal\nAdder.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
    done.communicate()
    assert done.returncode == -signal.SIGKILL
    again = script("--resume", "--out", "run")
    said, error = again.communicate()
    assert again.returncode == 0 and error == "" and "the run starts over from step 0" in said
    steps = [json.loads(line)["step"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 4, 6]


def test_a_folder_removed_in_mid_run_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from parity_tests.killed import Adder

    class Removing(Adder):
        def train_step(self, step: int, tokens_BT1: Any) -> float:
            if step == 3:
                shutil.rmtree("run")
            return super().train_step(step, tokens_BT1)

    monkeypatch.setattr(loop, "make_learner", Removing)
    monkeypatch.setattr(sys, "argv", ["train.py", *RUN, "--out", "run"])
    assert loop.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "run was removed or replaced during the run" in error
    assert not (place / "run").exists()


def test_ctrl_c_twice_is_no_traceback(place: Path) -> None:
    """The second one comes once all is saved, before the process has ended."""
    before = (
        "import os, signal, atexit\nstep = Adder.train_step\n"
        "def stopped(self, *a):\n    os.kill(os.getpid(), signal.SIGINT)\n    return step(self, *a)\nAdder.train_step = stopped\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    )
    done = script(*RUN, "--out", "run", before=before)
    said, error = done.communicate()
    assert done.returncode == 130 and error == "" and "stopped and saved at step 1 of 6" in said


def test_ctrl_c_before_there_is_a_run_is_one_line(place: Path) -> None:
    done = script(*RUN, before="import os, signal\nloop.read_task = lambda config: os.kill(os.getpid(), signal.SIGINT)")
    assert done.communicate()[1] in ("stopped at once, nothing more was saved\n", "stopped\n") and done.returncode == 130
    assert main(["inspect", str(place / "runs")]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sample-length", "2147483648"), "sample_length=2147483648: must be at most 1,000,000"),
        (("--seed", "4294967296"), "seed=4294967296: must be 0 to 4294967295"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_at_the_start(
    words: tuple[str, ...], said: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *RUN, "--out", "run", *words])
    assert loop.main() == 2 and capsys.readouterr().err == f"error: {said}\n" and not Path("run").exists()


def test_a_disk_too_small_for_the_checkpoints_is_said_at_the_start(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100))
    monkeypatch.setattr(sys, "argv", ["train.py", *RUN, "--out", "run"])
    assert loop.main() == 2 and "100 are free" in capsys.readouterr().err and not Path("run").exists()
