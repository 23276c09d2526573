"""`jax-moe` on Hugging Face folders and Orbax checkpoints: inspect, port, interruptions, and every kind of bad input."""

import errno
import fcntl
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.cli import main
from jax_moe.decoder_config import DecoderConfig
from jax_moe.porting import checkpoint, decoder_port, files, stream
from jax_moe.porting.api import flatten
from jax_moe.porting.config_files import config_from_json, config_to_json
from jax_moe.porting.engine import make_plan
from jax_moe.porting.families.hf import decoder_tables, family_named
from jax_moe.porting.files import read_safetensors, read_state, verify, write_safetensors, write_state
from jax_moe.porting.hf_folder import abstract_decoder, decoder_shapes
from parity_tests.compare import check_exact
from parity_tests.porting_cases import STATES
from parity_tests.test_cli import fails
from parity_tests.test_pretrained import BROKEN, CONFIGS, decoder, weights

ROOT = Path(__file__).parent.parent
SHARD = 4000  # bytes: five shards
MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "rope_theta": 1e6,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "router_aux_loss_coef": 0.02, "torch_dtype": "bfloat16",
}


def holes(folder: Path, values: dict[str, Any], shards: int) -> Path:
    """A folder of those sizes in bf16 whose files are headers and then nothing: no disk, and no weight that could be read."""
    config = family_named(values["model_type"]).config(values)
    plan = make_plan(decoder_tables(config, values["model_type"])[0], decoder_shapes(abstract_decoder(config)))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    where = {}
    for number in range(shards):
        file, about, end = f"model-{number + 1:05d}-of-{shards:05d}.safetensors", {}, 0
        for name in list(plan.their_shapes)[number::shards]:
            start, end = end, end + 2 * int(np.prod(plan.their_shapes[name], dtype=np.int64))
            about[name] = {"dtype": "BF16", "shape": list(plan.their_shapes[name]), "data_offsets": [start, end]}
            where[name] = file
        text = json.dumps(about).encode()
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral-8x7B as published, 87 GiB of nothing."""
    return holes(tmp_path_factory.mktemp("holes") / "Mixtral-8x7B-v0.1", MIXTRAL_8X7B, 19)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE folder in five shards, with a tokenizer, that nobody changes."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    jax_moe.save_pretrained(decoder("qwen2_moe"), folder, model_type="qwen2_moe", max_shard_bytes=SHARD)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit(7)")
    return folder


@pytest.fixture(scope="module")
def orbax(whole: Path) -> Path:
    """The same as an Orbax checkpoint."""
    assert main(["port", str(whole), str(whole.parent / "orbax-0.1")]) == 0
    return whole.parent / "orbax-0.1"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that must succeed prints; nothing on stderr."""
    assert main([str(argument) for argument in arguments]) == 0
    streams = capsys.readouterr()
    assert streams.err == ""
    return streams.out


def command(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after some Python."""
    code = f"{before}\nimport sys\nfrom jax_moe.cli import main\nsys.exit(main({[str(one) for one in arguments]!r}))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}


def same_folders(one: Path, two: Path) -> None:
    """Raises unless both have the same weights, bit for bit, and the same config and tokenizer."""
    check_exact(weights(one), weights(two), "weights")
    for name in ("config.json", "tokenizer.json"):
        assert (one / name).exists() == (two / name).exists()
        assert not (one / name).exists() or (one / name).read_bytes() == (two / name).read_bytes(), name


# inspect


def test_inspect_counts_the_published_mixtral(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """46.7 and 12.9 billion parameters, as its authors say; here to the last one, with a pencil."""
    D, F, L, V, E, K = 4096, 14336, 32, 32000, 8, 2
    layer = 2 * D * D + 2 * D * 1024 + E * D + 2 * D  # q, o; k, v; router; norms
    expert, outside = 3 * D * F, 2 * V * D + D
    total, active = L * (layer + E * expert) + outside, L * (layer + K * expert) + outside
    assert (round(total / 1e8), round(active / 1e8)) == (467, 129)
    out = run(capsys, "inspect", mixtral)
    other = total - L * E * expert
    rows = dict(re.findall(r"^  (\w.*?)  +((?:[\d.,]+ GiB *)+)$", out, re.MULTILINE))
    devices = (1, 2, 4, 8)
    expected = {
        "weights, on every device": [2 * total] * 4,
        "weights, experts split": [2 * (other + L * E * expert / n) for n in devices],
        "training, on every device": [16 * total] * 4,
        "training, experts split": [16 * (other + L * E * expert / n) for n in devices],
    }
    assert {what: row.split("GiB")[:4] for what, row in rows.items()}.keys() == expected.keys()
    for what, sizes in expected.items():
        assert re.findall(r"[\d.]+", rows[what]) == [f"{size / 2**30:.1f}" for size in sizes], what
    for words in (
        f"mixtral, {total:,} parameters, {active:,} of them active", "19 files, 87.0 GiB, 995 tensors", "87.0 GiB bfloat16",
        "32 heads of width 128, each key and value head serving 4", "softmax over all, then the best 2 of 8",
        "weights: divided by their sum", "8 of 4096 -> 14336 -> 4096, gated silu", "f summing to the top-k",
        "precision: router in the model's dtype, its weights in fp32",
    ):
        assert words in out, words


def test_inspect_reads_no_weight_and_loads_no_framework_of_theirs(mixtral: Path) -> None:
    """87 GiB in a process that may hold 8: and neither torch nor transformers nor orbax is imported."""
    check = "import atexit, resource, sys\nresource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))\n"
    check += "heavy = ('torch', 'transformers', 'orbax')\n"
    check += "atexit.register(lambda: print('loaded', [name for name in heavy if name in sys.modules]))"
    done = command("inspect", mixtral, before=check)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("loaded []\n")


WORDS = {
    "mixtral": ["a window of 3 positions in all layers", "rotary, base 1,000,000", "layers: 3, each with a mixture"],
    "qwen2_moe": [
        "2 with a mixture, 1 dense of width 5 (layer 1)", "a window of 3 positions in layers 0, 2",
        "shared expert: width 4, behind a sigmoid gate", "biases on queries, keys and values",
    ],
    "qwen3_moe": ["each head's queries and keys normed", "stretched 2 times from 8 positions (yarn)", "2 dense of width 5"],
    "olmoe": ["normed over their full width", "clipped to +-3.5", "weight 0.02", "queries, keys and values and the output"],
    "granitemoe": [
        "the head is the embedding", "scores times 0.2",
        "embeddings times 2, each half of a block times 0.5, logits divided by 3",
        "the best 2 of 4, then softmax over them",
    ],
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_inspect_says_the_contract(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In words, and as it stands in the config.json of an Orbax folder."""
    model = decoder(model_type)
    jax_moe.save_pretrained(model, tmp_path / "model", model_type=model_type)
    out = run(capsys, "inspect", tmp_path / "model")
    for words in WORDS[model_type]:
        assert words in out, words
    assert config_from_json(DecoderConfig, json.loads(json.dumps(config_to_json(model.config))), "config") == model.config


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


def test_inspect_on_chosen_devices_and_with_names(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three devices share four experts: the fullest has two of four."""
    out = run(capsys, "inspect", whole, "--devices", "3", "--names")
    held = weights(whole)
    total = sum(value.size for value in held.values())
    experts = sum(value.size for name, value in held.items() if ".experts." in name)
    split = 16 * (total - experts / 2)
    assert re.search(rf"training, experts split +{split / 1024:.1f} KiB\n", out)
    for name, value in held.items():
        assert re.search(rf"^{re.escape(name)} +float32  {re.escape(str(list(value.shape)))}$", out, re.MULTILINE), name
    assert "devices=0: must be at least 1" in fails(capsys, "inspect", whole, "--devices", "0")
    assert "top_k: must be left out for a folder" in fails(capsys, "inspect", whole, "--top-k", "1")


# port between Hugging Face folders


def test_shards_and_dtype(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "port", whole, tmp_path / "narrow", "--to", "hf", "--dtype", "bfloat16", "--max-shard-bytes", "1500")
    shards = [read_safetensors(file) for file in sorted((tmp_path / "narrow").glob("*.safetensors"))]
    assert f"{len(shards)} shards, read back bit for bit" in out and len(shards) > 4
    assert all(len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= 1500 for shard in shards)
    found = {name: value for shard in shards for name, value in shard.items()}
    expected = {name: value.astype(found[name].dtype) for name, value in weights(whole).items()}
    assert {value.dtype.name for value in found.values()} == {"bfloat16"}
    check_exact(found, expected, "converted")
    index = json.loads((tmp_path / "narrow" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys() and index["metadata"]["total_size"] == sum(v.nbytes for v in found.values())
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "narrow" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "narrow" / "modeling_evil.py").exists()
    loaded = flatten(nnx.state(jax_moe.load_pretrained(tmp_path / "narrow")))
    check_exact(loaded, flatten(nnx.state(jax_moe.load_pretrained(whole, dtype="bfloat16"))), "loaded")
    run(capsys, "port", whole, tmp_path / "same", "--to", "hf")
    same_folders(tmp_path / "same", whole)


def test_a_folder_takes_its_own_place(folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    """Of 17 MB the largest tensor is 2.1 MB: what reading, writing and comparing add to memory stays under two of it."""
    moe = presets.mixtral(128, 256, 11, 2)
    model = decoder("mixtral", vocab_size=4096, model_dim=128, moe=moe, sliding_window=None, sliding_layers=())
    jax_moe.save_pretrained(model, tmp_path / "big", model_type="mixtral")
    largest = 4096 * 128 * 4
    del model
    real, peaks = decoder_port.write_shards, []

    def write_shards(*arguments: Any) -> int:
        tracemalloc.start()
        try:
            return real(*arguments)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(decoder_port, "write_shards", write_shards)
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


# interrupted


def stop_before(number: int, how: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens as the shard of that number, from 1, is to be written."""
    real, seen = stream.write_tensors, []

    def write(path: Path, headers: Any) -> None:
        seen.append(path)
        if len(seen) == number:
            path.write_bytes(b"half")
            how()
        real(path, headers)

    monkeypatch.setattr(stream, "write_tensors", write)


def interrupt() -> None:
    """Ctrl-C, also where the tests run in the background and inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


PORT = ("--to", "hf", "--max-shard-bytes", "2000", "--dtype", "float16")


def test_interrupted_and_resumed(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, target, part = tmp_path / "expected", tmp_path / "target", tmp_path / ".target.part"
    run(capsys, "port", whole, expected, *PORT)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(3, interrupt, patch)
        assert main(["port", str(whole), str(target), *PORT]) == 130
    assert capsys.readouterr().err == (
        f"jax-moe: interrupted: 2 finished shards wait in {part}: the same command goes on from there\n"
    )
    assert not target.exists()
    assert "2 left by an interrupted port" in run(capsys, "port", whole, target, *PORT)
    same_folders(target, expected)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {f.name: f.read_bytes() for f in expected.iterdir()}
    assert names(tmp_path) == {"expected", "target"}


def test_interrupted_before_anything_is_there(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_before(1, interrupt, patch)
        assert main(["port", str(whole), str(tmp_path / "target"), *PORT]) == 130
    assert capsys.readouterr().err == "jax-moe: interrupted\n" and names(tmp_path) == set()


def test_a_finished_shard_that_changed_is_written_again(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    with pytest.MonkeyPatch.context() as patch:
        stop_before(3, interrupt, patch)
        assert main(["port", str(whole), str(target), *PORT]) == 130
    first, second = sorted((tmp_path / ".target.part" / "target").glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-3])
    second.write_bytes(second.read_bytes()[:-1] + b"\x77")
    capsys.readouterr()
    assert "left by an interrupted port" not in run(capsys, "port", whole, target, *PORT)
    run(capsys, "port", whole, tmp_path / "expected", *PORT)
    same_folders(target, tmp_path / "expected")


@pytest.mark.parametrize("change", ["source", "dtype"])
def test_what_does_not_match_starts_afresh(
    change: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, arguments = tmp_path / "target", list(PORT)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(3, interrupt, patch)
        assert main(["port", str(folder), str(target), *arguments]) == 130
    capsys.readouterr()
    if change == "source":
        file = sorted(folder.glob("*.safetensors"))[0]
        state = read_safetensors(file)
        state[next(iter(state))] += 1
        write_safetensors(file, state)
    else:
        arguments[-1] = "bfloat16"
    assert main(["port", str(folder), str(target), *arguments]) == 0
    streams = capsys.readouterr()
    assert "starting afresh" in streams.err and streams.err.count("\n") == 1 and "left by" not in streams.out
    run(capsys, "port", folder, tmp_path / "expected", *arguments)
    same_folders(target, tmp_path / "expected")


def test_killed_and_resumed(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process is gone without a word; its lock with it."""
    before = "import os, signal, pytest\nfrom parity_tests.test_cli_folders import stop_before\n"
    before += "stop_before(3, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())"
    done = command("port", whole, tmp_path / "target", *PORT, before=before)
    assert done.returncode == -signal.SIGKILL and names(tmp_path) == {".target.part"}
    assert "2 left by an interrupted port" in run(capsys, "port", whole, tmp_path / "target", *PORT)
    assert names(tmp_path) == {"target"} and jax_moe.load_pretrained(tmp_path / "target")


def test_two_at_once(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".target.part").mkdir()
    with (tmp_path / ".target.part" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another port is writing it" in fails(capsys, "port", whole, tmp_path / "target", *PORT)
    run(capsys, "port", whole, tmp_path / "target", *PORT)


# bad input


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
    assert "must end in one of" in fails(capsys, "parity", file) and "must end in one of" in fails(capsys, "inspect", file)
    write_state(tmp_path / "a.safetensors", STATES["mixtral"]())
    line = fails(capsys, "port", tmp_path / "a.safetensors", tmp_path / "out", "--to", "hf")
    assert "is no Hugging Face model: --to must be torch" in line
    assert names(tmp_path) == {"model", "file.txt", "mine", "a.safetensors"} and names(mine) == {"thesis.txt"}
    same_folders(folder, whole)


def test_no_space_is_said_before_anything_is_written(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for to in ("hf", "orbax"):
        line = fails(capsys, "port", whole, tmp_path / "out", "--to", to)
        assert re.search(r"No space left on device: needs [\d,]+ bytes, 1,000 are free", line) and names(tmp_path) == set()


def test_a_disk_that_fills_leaves_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stop_before(3, full, monkeypatch)
    line = fails(capsys, "port", whole, tmp_path / "out", *PORT)
    assert "cannot be written (No space left on device)" in line and names(tmp_path) == set()


def test_a_file_that_the_system_refuses_leaves_nothing(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real refusal, by the system's limit on a file's size; Orbax in a process of its own, for what its threads say late."""
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
