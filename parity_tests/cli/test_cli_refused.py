"""`jax-moe` on folders that are broken, places that do not fit and disks that are full: one line, nothing written."""

import errno
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jax_moe import disk
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from jax_moe.porting.formats.state_file import write_state
from moe_cli.main import main
from parity_tests.cli.commands import PORT, command, fails, names, run, same_folders, stop_before
from parity_tests.porting.broken_folders import BROKEN
from parity_tests.porting.decoder_cases import weights
from parity_tests.porting.porting_cases import STATES
from parity_tests.shared.compare import check_exact

OTHERWISE = {"config is a list": 'must say "format"'}  # no Hugging Face folder, to its looks


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with all that is wrong, from headers where they tell; nothing written."""
    BROKEN[name][0](folder)
    words = OTHERWISE.get(name, BROKEN[name][1])
    if name == "NaN":  # a weight, which inspect does not read
        assert main(["inspect", str(folder)]) == 0
        capsys.readouterr()
    else:
        assert re.search(words, fails(capsys, "inspect", folder))
    words = words.replace("NaN or infinity: 1 wrong: lm_head.weight", "1 wrong: .* holds NaN or infinity")
    assert re.search(words, fails(capsys, "port", folder, tmp_path / "out", "--to", "hf"))
    assert names(tmp_path) == {"model"}


def test_nan_and_what_is_too_large(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them are named; on request they pass."""
    for file, value in zip(sorted(folder.glob("*.safetensors"))[1:4], (np.nan, np.inf, 1e6), strict=True):
        state = read_safetensors(file)
        state[min(state)].flat[0] = value
        write_safetensors(file, state)
    line = fails(capsys, "port", folder, tmp_path / "out", *PORT)
    assert line.count("holds NaN or infinity") == 2 and line.count("is too large for float16") == 1
    assert "2 wrong" in fails(capsys, "port", folder, tmp_path / "out", "--to", "hf")
    assert names(tmp_path) == {"model"}
    run(capsys, "port", folder, tmp_path / "orbax", "--allow-nonfinite")
    run(capsys, "port", tmp_path / "orbax", tmp_path / "out", "--allow-nonfinite")
    check_exact(weights(tmp_path / "out"), weights(folder), "NaN and all")


def test_damaged_orbax(orbax: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def changed(file: Path) -> None:
        file.write_bytes(b"\x00" + file.read_bytes()[1:])

    def about(**changes: Any) -> None:
        file = tmp_path / "bad" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    faults: dict[str, Callable[[Path], object]] = {
        "changed: state/": changed,
        "missing or of another size: state/": Path.unlink,
        r"origin=3: must be an object": lambda _: about(origin=3),
        r"files={}: must be an object of size and sha256": lambda _: about(files={}),
        r"storage='zip': must be one of safetensors, orbax": lambda _: about(storage="zip"),
        r"config: unknown weight": lambda _: about(config={"weight": 1}),
    }
    for words, fault in faults.items():
        shutil.copytree(orbax, tmp_path / "bad")
        fault(max((tmp_path / "bad" / "state").rglob("d/*"), key=lambda file: file.stat().st_size))
        assert re.search(words, fails(capsys, "port", tmp_path / "bad", tmp_path / "out")), words
        shutil.rmtree(tmp_path / "bad")
    assert names(tmp_path) == set()


def test_places_that_do_not_fit(whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, mine = tmp_path / "file.txt", tmp_path / "mine"
    file.write_text("mine")
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    for arguments, words in (
        ((file, tmp_path / "out"), "file.txt: must end in one of"),
        ((tmp_path / "no", tmp_path / "out"), "no such file"),
        ((folder, folder / "in"), f"in: must not lie inside {folder}"),
        ((folder, tmp_path, "--overwrite"), f"must not hold {folder}"),
        ((folder, file), "exists already; --overwrite replaces it"),
        ((folder, file, "--overwrite"), "is not a checkpoint; it is not replaced"),
        ((folder, mine, "--to", "hf"), "exists already"),
        ((folder, mine, "--to", "hf", "--overwrite"), "is not a checkpoint; it is not replaced"),
        ((folder, tmp_path / "no" / "out", "--to", "hf"), "is not a folder"),
        ((folder, tmp_path / ("x" * 300), "--to", "hf"), "cannot be written"),
        ((folder, tmp_path / ("x" * 252), "--to", "hf"), "cannot be written"),
        ((folder, tmp_path / "out.safetensors"), "--to must be hf or orbax"),
        ((folder, tmp_path / "out", "--to", "torch"), "--to must be hf or orbax"),
        ((folder, tmp_path / "out", "--to", "folder"), "--to must be hf or orbax"),
        ((folder, tmp_path / "out", "--top-k", "1"), "top_k: must be left out for a Hugging Face model"),
        ((folder, tmp_path / "out", "--text", file), "text: must be left out for a Hugging Face model"),
        ((folder, tmp_path / "out", "--to", "hf", "--max-shard-bytes", "0"), "max_shard_bytes=0: must be at least 1"),
    ):
        assert words in fails(capsys, "port", *arguments), arguments
    assert (
        "must end in one of" in fails(capsys, "parity", file) and "must end in one of" in fails(capsys, "inspect", file)
    )
    write_state(tmp_path / "a.safetensors", STATES["mixtral"]())
    line = fails(capsys, "port", tmp_path / "a.safetensors", tmp_path / "out", "--to", "hf")
    assert "is not a Hugging Face model: --to must be torch" in line
    assert names(tmp_path) == {"model", "file.txt", "mine", "a.safetensors"} and names(mine) == {"thesis.txt"}
    same_folders(folder, whole)


def test_no_space_is_said_before_anything_is_written(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for to in ("hf", "orbax"):
        line = fails(capsys, "port", whole, tmp_path / "out", "--to", to)
        assert (
            re.search(r"No space left on device: needs [\d,]+ bytes, 1,000 are free", line) and names(tmp_path) == set()
        )


def test_a_disk_that_fills_leaves_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stop_before(3, full, monkeypatch)
    line = fails(capsys, "port", whole, tmp_path / "out", *PORT)
    assert "cannot be written (No space left on device)" in line and names(tmp_path) == set()


def test_a_file_that_the_system_refuses_leaves_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real refusal, by the system's limit on file size; Orbax in a subprocess, as its threads print late."""
    refused = f"jax-moe: error: {tmp_path / 'out'}: cannot be written (File too large)\n"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        assert fails(capsys, "port", whole, tmp_path / "out", "--to", "hf") == refused and names(tmp_path) == set()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    before = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    done = command("port", whole, tmp_path / "out", "--to", "orbax", before=before)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", refused) and names(tmp_path) == set()
