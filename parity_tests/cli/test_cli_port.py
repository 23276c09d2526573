"""`jax-moe port` between Hugging Face folders and Orbax checkpoints: what arrives, its memory and its progress."""

import io
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.disk import verify
from jax_moe.porting import checkpoint, convert
from jax_moe.porting.formats.safetensors import read_safetensors
from jax_moe.porting.formats.state_file import read_state, write_state
from jax_moe.porting.state_dict import flatten
from moe_cli.main import main
from parity_tests.cli.commands import fails, names, run, same_folders
from parity_tests.porting.decoder_cases import decoder, weights
from parity_tests.porting.porting_cases import STATES
from parity_tests.shared.compare import check_exact


def test_port_to_orbax_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything returns, and both forms say the same of themselves."""
    there, orbax, back = tmp_path / "there", tmp_path / "orbax-0.1", tmp_path / "back"
    model = decoder("granitemoe", "bfloat16")
    jax_moe.save_pretrained(model, there, model_type="granitemoe")
    (there / "tokenizer.json").write_text('{"a": 1}')
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    out = run(capsys, "port", there, orbax)
    assert out == f"wrote {orbax} (orbax): granitemoe, {count:,} parameters, bfloat16, read back bit for bit\n"
    out = run(capsys, "port", orbax, back)
    assert out == f"wrote {back} (hf): granitemoe, {count:,} parameters, bfloat16, 1 file, read back bit for bit\n"
    same_folders(back, there)
    assert names(tmp_path) == {"there", "orbax-0.1", "back"}
    told = [run(capsys, "inspect", place).splitlines() for place in (there, orbax)]
    ours, theirs = ([line for line in lines if not line.startswith("files: ")] for lines in told)
    assert ours == theirs and ours[0].startswith(f"granitemoe, {count:,} parameters")


def test_orbax_reads_it_alone_and_so_do_we(
    whole: Path, orbax: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orbax.checkpoint import v1 as ocp

    expected = flatten(nnx.state(jax_moe.load_pretrained(whole)))
    tree = ocp.load_checkpointables(orbax)["state"]
    check_exact(flatten(tree), expected, "what Orbax reads")
    loaded = checkpoint.load(orbax)
    assert (loaded.name, loaded.family) == ("qwen2_moe", "decoder")
    check_exact(loaded.weights, expected, "what we read")
    jax_moe.save_pretrained(loaded.module, tmp_path / "saved")  # type: ignore[arg-type]
    same_folders(tmp_path / "saved", whole)
    run(capsys, "port", orbax, tmp_path / "back")
    same_folders(tmp_path / "back", whole)


@pytest.mark.parametrize("family", ["mixtral", "soft_moe"])
def test_small_families_by_orbax(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = STATES[family]()
    write_state(tmp_path / "a.safetensors", state)
    run(capsys, "port", tmp_path / "a.safetensors", tmp_path / "orbax", "--to", "orbax")
    assert f"{family}, " in run(capsys, "inspect", tmp_path / "orbax")
    run(capsys, "port", tmp_path / "orbax", tmp_path / "folder")
    run(capsys, "port", tmp_path / "folder", tmp_path / "b.safetensors")
    verify(state, read_state(tmp_path / "b.safetensors"), tmp_path)


def test_shards_and_dtype(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(
        capsys, "port", whole, tmp_path / "narrow", "--to", "hf", "--dtype", "bfloat16", "--max-shard-bytes", "1500"
    )
    shards = [read_safetensors(file) for file in sorted((tmp_path / "narrow").glob("*.safetensors"))]
    assert f"{len(shards)} shards, read back bit for bit" in out and len(shards) > 4
    assert all(len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= 1500 for shard in shards)
    found = {name: value for shard in shards for name, value in shard.items()}
    expected = {name: value.astype(found[name].dtype) for name, value in weights(whole).items()}
    assert {value.dtype.name for value in found.values()} == {"bfloat16"}
    check_exact(found, expected, "converted")
    index = json.loads((tmp_path / "narrow" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in found.values())
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "narrow" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "narrow" / "modeling_evil.py").exists()
    loaded = flatten(nnx.state(jax_moe.load_pretrained(tmp_path / "narrow")))
    check_exact(loaded, flatten(nnx.state(jax_moe.load_pretrained(whole, dtype="bfloat16"))), "loaded")
    run(capsys, "port", whole, tmp_path / "same", "--to", "hf")
    same_folders(tmp_path / "same", whole)


def test_a_folder_takes_its_own_place(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exists already; --overwrite" in fails(capsys, "port", folder, folder, "--to", "hf")
    run(capsys, "port", folder, folder, "--to", "hf", "--overwrite")
    same_folders(folder, whole)
    assert len(list(folder.glob("*.safetensors"))) == 1 and names(tmp_path) == {"model"}
    run(capsys, "port", whole, folder, "--overwrite")
    assert "an Orbax checkpoint" in run(capsys, "inspect", folder)
    run(capsys, "port", whole, folder, "--to", "hf", "--overwrite")
    same_folders(folder, whole)
    assert names(tmp_path) == {"model"}


def test_memory_of_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest of 17 MB is a tensor of 2.1 MB: reading, writing and comparing add less than twice that to memory."""
    moe = presets.mixtral(128, 256, 11, 2)
    model = decoder("mixtral", vocab_size=4096, model_dim=128, moe=moe, sliding_window=None, sliding_layers=())
    jax_moe.save_pretrained(model, tmp_path / "big", model_type="mixtral")
    largest = 4096 * 128 * 4
    del model
    real, peaks = convert.write_shards, []

    def write_shards(*arguments: Any) -> int:
        tracemalloc.start()
        try:
            return real(*arguments)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(convert, "write_shards", write_shards)
    assert main(["port", str(tmp_path / "big"), str(tmp_path / "half"), "--to", "hf", "--dtype", "float16"]) == 0
    assert (tmp_path / "half" / "model.safetensors").stat().st_size > 4 * largest
    assert len(peaks) == 1 and peaks[0] < 2 * largest


def test_progress_is_shown_on_a_terminal_only(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, to in (("hf", "hf"), ("orbax", "orbax")):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(["port", str(whole), str(tmp_path / name), "--to", to]) == 0
        assert f"writing {name}" in terminal.getvalue() and "kB" in terminal.getvalue()
