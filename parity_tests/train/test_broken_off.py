"""Two runs in one folder, a full disk, a vanished folder, Ctrl-C at a bad moment: one line, and nothing is lost."""

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jax_moe import process
from jax_moe.locks import Lock
from jax_moe.porting.formats.orbax import quiet
from moe_train import loop
from moe_train.run import folder as run_folder
from parity_tests.shared.zygote import Zygote
from parity_tests.train.test_train_run import SCRIPT, TEXT, CountingLearner, a_run, numbers

SETTINGS = [
    "--data", "text.txt", "--steps", "6", "--eval-every", "50", "--eval-batches", "1", "--checkpoint-every", "2",
    "--batch-size", "4", "--num-layers", "1", "--model-dim", "8", "--num-heads", "1", "--num-experts", "2",
    "--block-size", "4", "--warmup-steps", "2", "--sample-length", "4",
]
FULL = 10_000  # bytes: settings and metrics fit, a checkpoint does not
LIMIT = (
    "import os, resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
    "os.execv(sys.argv[2], sys.argv[2:])"
)
FULL_DISK = "cannot be written (File too large)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    with Zygote(folder, "moe_train.loop:main", environment(folder)) as zygote:
        assert zygote.run(*SETTINGS).status == 0  # runs/001
        yield zygote


def environment(folder: Path) -> dict[str, str]:
    """The environment: compiled programs are cached, with quick options."""
    return {
        "JAX_COMPILATION_CACHE_DIR": f"{folder}.programs", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu",
    }


def script(runs: Zygote, *words: str, most_bytes: int = -1, **more: str) -> subprocess.Popen[str]:
    """Runs the script itself, from start to end."""
    limited = [sys.executable, "-c", LIMIT, str(most_bytes), sys.executable, *SCRIPT, *words]
    return subprocess.Popen(
        limited, cwd=runs.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **environment(runs.folder), **more},
    )


def test_two_starts_at_once(runs: Zygote) -> None:
    """Without --out each run gets its own folder; with the same --out the second is refused before it writes."""
    answers = runs.together([SETTINGS, SETTINGS])
    assert [done.status for done in answers] == [0, 0], answers
    assert {path.name for path in (runs.folder / "runs").iterdir()} == {"001", "002", "003"}
    first, second = (runs.folder / "runs" / name for name in ("002", "003"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    answers = sorted(runs.together([[*SETTINGS, "--out", "same"]] * 2))
    assert [done.status for done in answers] == [0, 2], answers
    assert answers[1].printed in (
        "error: out='same': is being written by another process; wait for its end, or stop it\n",
        "error: out='same': must be new or empty; --resume continues the run in it\n",
    )


def test_resumed_beside_the_running_run(runs: Zygote) -> None:
    running = Lock(runs.folder / "runs" / "001" / ".lock")
    done = runs.run("--resume", "--out", "runs/001")
    running.release()
    assert done.status == 2 and "out='runs/001': is being written by another process" in done.printed


def test_a_full_disk(runs: Zygote) -> None:
    done = runs.run(*SETTINGS, "--out", "full", most_bytes=FULL)
    assert done.status == 1 and done.printed.splitlines()[-1].startswith("error: "), done.printed
    assert "no checkpoint was saved; --resume starts over" in done.printed and FULL_DISK in done.printed
    assert "Traceback" not in done.printed
    done = runs.run("--resume", "--out", "full")
    assert done.status == 0 and "full has no checkpoint yet: it starts over at step 0" in done.printed
    assert numbers(runs.folder / "full") == numbers(runs.folder / "runs" / "001")


def test_a_disk_that_fills_later_ends_the_process_at_once(runs: Zygote) -> None:
    """The previous checkpoint is named; no thread of a library keeps the process alive."""
    shutil.copytree(runs.folder / "runs" / "001", runs.folder / "later")
    for path in (runs.folder / "later" / "checkpoints").glob("6*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with script(runs, "--resume", "--out", "later", most_bytes=FULL) as process:
        assert process.stderr is not None
        error = process.stderr.readline()
        since = time.perf_counter()
        error += process.stderr.read()
        assert process.wait(60) == 1
        assert time.perf_counter() - since < 5
    assert FULL_DISK in error and error.count("\n") == 1
    assert error.endswith("the last checkpoint is of step 4, in later/checkpoints; --resume goes on from it\n")
    assert runs.run("--resume", "--out", "later").status == 0


def test_a_thread_that_outlives_an_error_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Orbax reports a full disk again, from its own thread, after the error was raised; and asyncio does, from any
    thread, when it collects a task of Orbax's that the error held.
    """
    raised = threading.Event()

    def late() -> None:
        raised.wait(9)
        logging.getLogger("absl").error("too late")

    thread = threading.Thread(target=late)
    with pytest.raises(OSError), quiet():
        thread.start()
        raise OSError
    raised.set()
    thread.join()
    logging.getLogger("absl").error("heard")
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <... at orbax/checkpoint/x.py>")
    assert caplog.messages == ["heard"]


FAKE_TYRO = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
os.kill(os.getpid(), signal.SIGINT)
time.sleep(9)
"""


def test_ctrl_c_while_it_is_imported(runs: Zygote, tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text(FAKE_TYRO)
    process = script(runs, "--out", "never", PYTHONPATH=str(tmp_path))
    assert process.communicate(timeout=60) == ("", "stopped at once, nothing more was saved\n")
    assert process.returncode == 130 and not (runs.folder / "never").exists()


def test_ctrl_c_again_and_again(runs: Zygote) -> None:
    words = [*SETTINGS, "--steps", "100000", "--out", "often"]
    with script(runs, *words) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("step 0") or "stopped and saved" in line:
                process.send_signal(signal.SIGINT)
            if "stopped and saved" in line:
                for _ in range(5):
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.01)
        error = process.stderr.read()
    assert process.returncode == 130
    assert error == "" or (error.startswith("stopped at once") and error.count("\n") == 1), error


OWN = """
import asyncio, gc, os, signal
from jax_moe import process

async def left_behind(): pass

signal.signal(signal.SIGINT, signal.default_int_handler)
process.own()
left_behind()
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("answered", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still there", flush=True)
"""


def test_a_command_owns_its_process() -> None:
    """While Ctrl-C is answered, another is no second KeyboardInterrupt; what a library leaves behind is not shown."""
    done = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "answered\n", "")


def test_a_folder_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Removed, or replaced by another folder, at the first, a middle or the last step: the status is never 0."""
    for step in (0, 3, 9):
        for again in (False, True):
            run = a_run(tmp_path / f"{step}{again}")
            assert isinstance(run.learner, CountingLearner)

            def gone(now: int, run: loop.Run = run, step: int = step, again: bool = again) -> None:
                if now == step:
                    shutil.rmtree(run.folder)
                    if again:
                        run.folder.mkdir()

            run.learner.on_step = gone
            monkeypatch.setattr(loop, "read_settings", lambda arguments: ())
            monkeypatch.setattr(loop, "prepare", lambda run=run: run)
            assert loop.main() == 1
            error = capsys.readouterr().err
            assert "was removed or replaced while the run wrote to it" in error and error.count("\n") == 1


def test_what_is_needed_at_the_end_is_looked_at_first(runs: Zygote, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(runs.folder)
    for words, said in (
        (["--sample-length", "2147483648"], "sample_length=2147483648: must be at most 1,000,000"),
        (["--sample-length", "0"], "sample_length=0"),
    ):
        monkeypatch.setattr(sys, "argv", ["train/train.py", *SETTINGS, *words, "--out", "not"])
        assert loop.main() == 2
        assert said in capsys.readouterr().err and not Path("not").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path, real=shutil.disk_usage: real(path)._replace(free=5000))
    monkeypatch.setattr(sys, "argv", ["train/train.py", *SETTINGS, "--out", "not"])
    assert loop.main() == 2
    assert "5,000 are free" in capsys.readouterr().err and not Path("not").exists()


@pytest.mark.parametrize("number", [3, 4])
def test_a_run_whose_checkpoints_are_missing_does_not_start_over(number: int, tmp_path: Path) -> None:
    """Only a run that may not have saved starts over: its metrics stop before its second checkpoint is due."""
    run = a_run(tmp_path / "run")
    assert loop.train(run) == 0
    assert not run_folder.never_saved(run.folder, run.config)
    path = run.folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:number]))
    assert run_folder.never_saved(run.folder, run.config) == (number < 4)  # rows at 0, 3, 6 and 9; saved every 4


def test_output_never_fails_for_its_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    process.any_encoding()
    for stream in streams:
        print("caf\u00e9 \U0001f600 \udc80", file=stream, flush=True)
        assert stream.buffer.getvalue() == b"caf\\xe9 \\U0001f600 \\udc80\n"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    process.any_encoding()


def test_an_emoji_in_a_sample_on_an_ascii_terminal(runs: Zygote) -> None:
    (runs.folder / "faces.txt").write_text("\U0001f600\U0001f601" * 50, encoding="utf-8")
    words = ["--data", "faces.txt", "--sample-prompt", "\U0001f600", *SETTINGS[2:], "--out", "faces"]
    process = script(runs, *words, PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    out, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (0, "") and "\\U0001f600" in out and out.endswith("wrote faces\n")


def test_help_that_is_not_read_to_its_end() -> None:
    """A reader that stops, as `head` does, is no error; a full disk is one line."""
    command = [sys.executable, *SCRIPT, "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")
