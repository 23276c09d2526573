"""`jax-moe` in tests: its output, its errors, the files it leaves, and ways to interrupt it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jax_moe.porting.formats import resumable
from moe_cli.main import main
from parity_tests.porting.decoder_cases import weights
from parity_tests.shared.compare import check_exact

ROOT = Path(__file__).parents[2]
PORT = ("--to", "hf", "--max-shard-bytes", "2000", "--dtype", "float16")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The output of a command that must succeed; stderr may only name assumed settings."""
    assert main([str(argument) for argument in arguments]) == 0
    streams = capsys.readouterr()
    assert [
        line for line in streams.err.splitlines() if ": assumed, as the file does not store them: " not in line
    ] == []
    return streams.out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error line of a command that must fail with status 1, one line on stderr and at most a listing on stdout."""
    assert main([str(argument) for argument in arguments]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("jax-moe: error: ") and errors.count("\n") == 1
    return errors


def command(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a subprocess, after the Python code `before`."""
    words = ["jax-moe", *map(str, arguments)]
    code = f"{before}\nimport sys\nfrom moe_cli.main import main\nsys.argv = {words!r}\nsys.exit(main())"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def names(folder: Path) -> set[str]:
    """The names in a folder, including hidden files."""
    return {path.name for path in folder.iterdir()}


def same_folders(first: Path, second: Path) -> None:
    """Raises unless weights, config and tokenizer are equal, bit for bit."""
    check_exact(weights(first), weights(second), "weights")
    for name in ("config.json", "tokenizer.json"):
        assert (first / name).exists() == (second / name).exists()
        assert not (first / name).exists() or (first / name).read_bytes() == (second / name).read_bytes(), name


def stop_before(number: int, how: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls `how` before the shard of that number, counted from 1, is written."""
    real, seen = resumable.write_tensors, []

    def write(path: Path, headers: Any) -> None:
        seen.append(path)
        if len(seen) == number:
            path.write_bytes(b"half")
            how()
        real(path, headers)

    monkeypatch.setattr(resumable, "write_tensors", write)


def interrupt() -> None:
    """Ctrl-C, also in background processes, which inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
