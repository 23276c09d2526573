"""Two thousand damaged files (`make fuzz`: more), and the fuzzer notices a reader that lets an exception through."""

import json
import os
from pathlib import Path

from parity_tests.fuzz.__main__ import damaged, finding, fuzz, write_files
from parity_tests.fuzz.kinds import Kind, kinds

COUNT = int(os.environ.get("FUZZ", "2000"))


def test_no_reader_lets_an_exception_through() -> None:
    assert fuzz(COUNT, seed=0) == []


def test_every_valid_file_is_read(tmp_path: Path) -> None:
    """Otherwise the fuzzer would only test the first check."""
    for name, kind in kinds().items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        write_files(folder, {**kind.others(), kind.name: kind.valid()})
        kind.read(folder)


def test_the_fuzzer_finds_planted_faults(tmp_path: Path) -> None:
    """A reader without a guard: a KeyError, a RecursionError, gigabytes, a message of many lines."""
    import numpy as np

    def unguarded(folder: Path) -> object:
        return json.loads((folder / "x.json").read_text())["c"]

    naive = Kind("x.json", lambda: b'{"a": {"b": [1, 2, 3]}, "c": 4}', unguarded)
    found = [finding(naive, damaged(naive.valid(), np.random.default_rng(seed)), tmp_path) for seed in range(300)]
    assert all(any(said and name in said for said in found) for name in ("KeyError", "UnicodeDecodeError"))

    def greedy(folder: Path) -> None:
        np.ones(50_000_000)

    def wordy(folder: Path) -> None:
        raise ValueError("two\nlines")

    assert "bytes" in str(finding(Kind("x", bytes, greedy), b"", tmp_path))
    assert "two" in str(finding(Kind("x", bytes, wordy), b"", tmp_path))
