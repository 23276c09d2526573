"""`jax-moe` run by tests: what it prints, how it fails, what it leaves, and ways to stop it in the middle."""

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
    """What a command that must succeed prints; nothing on stderr but what was assumed of a file."""
    assert main([str(argument) for argument in arguments]) == 0
    streams = capsys.readouterr()
    assert [
        line for line in streams.err.splitlines() if ": assumed, as the file does not store them: " not in line
    ] == []
    return streams.out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must fail with status 1, nothing on stdout but a listing and one line on stderr; the line."""
    assert main([str(argument) for argument in arguments]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("jax-moe: error: ") and errors.count("\n") == 1
    return errors


def command(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after some Python."""
    words = ["jax-moe", *map(str, arguments)]
    code = f"{before}\nimport sys\nfrom moe_cli.main import main\nsys.argv = {words!r}\nsys.exit(main())"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}


def same_folders(one: Path, two: Path) -> None:
    """Raises unless both have the same weights, bit for bit, and the same config and tokenizer."""
    check_exact(weights(one), weights(two), "weights")
    for name in ("config.json", "tokenizer.json"):
        assert (one / name).exists() == (two / name).exists()
        assert not (one / name).exists() or (one / name).read_bytes() == (two / name).read_bytes(), name


def stop_before(number: int, how: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens as the shard of that number, from 1, is to be written."""
    real, seen = resumable.write_tensors, []

    def write(path: Path, headers: Any) -> None:
        seen.append(path)
        if len(seen) == number:
            path.write_bytes(b"half")
            how()
        real(path, headers)

    monkeypatch.setattr(resumable, "write_tensors", write)


def interrupt() -> None:
    """Ctrl-C, also where the tests run in the background and inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
