"""`jax-moe`: what it writes and prints, and one clear line for whatever is wrong; needs no torch."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jax_moe import presets
from jax_moe.cli import main
from jax_moe.porting.checkpoint import load
from jax_moe.porting.files import read_state, verify, write_state
from parity_tests.commands import fails
from parity_tests.porting_cases import STATES, drawn, makemoe_state, mixtral_state


def switch_state(dtype: str = "float32") -> dict[str, np.ndarray]:
    """Switch Transformers' sparse layer as transformers names it: 4 experts, width 8, expert width 6."""
    experts = {f"experts.expert_{e}.{name}.weight": shape for e in range(4) for name, shape in (("wi", (6, 8)), ("wo", (8, 6)))}
    return drawn({"router.classifier.weight": (4, 8), **experts}, dtype, seed=0)


FAMILIES = {**STATES, "switch": switch_state}
TEXT = "abcdefghijk"  # 11 characters, as TINY


@pytest.mark.parametrize("family", FAMILIES)
def test_port_there_and_back(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = FAMILIES[family]()
    write_state(tmp_path / "a.safetensors", state)
    assert main(["port", str(tmp_path / "a.safetensors"), str(tmp_path / "folder")]) == 0
    assert main(["port", str(tmp_path / "folder"), str(tmp_path / "b.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "read back bit for bit" in out and f"{family}, " in out
    verify(state, read_state(tmp_path / "b.safetensors"), tmp_path)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["family"] == family


def test_port_keeps_fp64_and_converts_on_request(tmp_path: Path) -> None:
    state = mixtral_state("float64")
    write_state(tmp_path / "a.safetensors", state)
    assert main(["port", str(tmp_path / "a.safetensors"), str(tmp_path / "folder")]) == 0
    assert main(["port", str(tmp_path / "folder"), str(tmp_path / "b.safetensors")]) == 0
    verify(state, read_state(tmp_path / "b.safetensors"), tmp_path)
    assert main(["port", str(tmp_path / "folder"), str(tmp_path / "c.safetensors"), "--dtype", "float32"]) == 0
    single = {name: value.astype(np.float32) for name, value in state.items()}
    verify(single, read_state(tmp_path / "c.safetensors"), tmp_path)


def test_inspect_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(tmp_path / "a.safetensors", makemoe_state())
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    out = capsys.readouterr().out
    count = sum(value.size for name, value in makemoe_state().items() if "tril" not in name)
    for words in (
        f"makemoe, {count:,} parameters, float32", "vocabulary 11, block 4, width 8, 3 layers of 2 heads",
        "the best 2 of 4, then softmax over them, with bias", "learned softplus noise on the logits, also at evaluation",
        "floor(tokens K / experts * 1.0)", "blocks.2.smoe.experts.3.net.0.weight", "[32, 8]",
    ):
        assert words in out, words


def test_a_switch_layer_and_its_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default transformers' 64 slots; or so many, or the paper's factor, or none dropped. bf16 and a router's bias return."""
    state = switch_state("bfloat16")
    state["router.classifier.bias"] = state["router.classifier.weight"][:, 0].copy()
    source = tmp_path / "a.safetensors"
    write_state(source, state)
    assert main(["port", str(source), str(tmp_path / "folder")]) == 0
    assert main(["port", str(tmp_path / "folder"), str(tmp_path / "b.safetensors")]) == 0
    verify(state, read_state(tmp_path / "b.safetensors"), tmp_path)
    layer = load(source)
    expected = presets.switch(8, 6, 4, expert_capacity=64, balance_per_sequence=True)
    assert layer.config == dataclasses.replace(expected, router=dataclasses.replace(expected.router, bias=True))
    up = np.asarray(layer.module.experts.up[...])  # type: ignore[attr-defined]
    np.testing.assert_array_equal(up[3], state["experts.expert_3.wi.weight"].T)
    capsys.readouterr()
    for arguments, words in (
        ([], "capacity: 64 slots an expert over one sequence, however long, in token order"),
        (["--expert-capacity", "3"], "capacity: 3 slots an expert over one sequence"),
        (["--capacity-factor", "1.25"], "capacity: ceil(tokens / experts * 1.25) slots an expert over one sequence"),
        (["--capacity-factor", "0"], "capacity: none, nothing is dropped"),
    ):
        assert main(["inspect", str(source), *arguments]) == 0
        out = capsys.readouterr().out
        assert words in out and ("balance loss: of each sequence, then their mean" in out) == ("none" not in words), out
    both = ["--expert-capacity", "3", "--capacity-factor", "1"]
    assert "capacity_factor, expert_capacity: must be one of the two" in fails(capsys, "inspect", source, *both)
    assert "slots=0: must be" in fails(capsys, "inspect", source, "--expert-capacity", "0")
    assert "top_k: must be a setting of switch" in fails(capsys, "inspect", source, "--top-k", "2")


def test_generate_writes_text_and_needs_the_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 2)
    write_state(tmp_path / "a.safetensors", makemoe_state())
    assert "--text" in fails(capsys, "generate", tmp_path / "a.safetensors", "--prompt", "a")
    port = ["port", str(tmp_path / "a.safetensors"), str(tmp_path / "folder"), "--text", str(tmp_path / "text.txt")]
    assert main(port) == 0
    capsys.readouterr()
    assert load(tmp_path / "folder").characters == TEXT
    greedy = ["generate", str(tmp_path / "folder"), "--prompt", "abc", "--max-new-tokens", "7", "--temperature", "0"]
    assert main(greedy) == 0
    first = capsys.readouterr().out
    assert first.startswith("abc") and len(first) == 11 and set(first.strip()) <= set(TEXT)
    sampled = [*greedy[:-1], "1.0", "--seed", "3", "--sample-top-k", "5"]
    assert main(sampled) == 0 and main(sampled) == 0
    again = capsys.readouterr().out.split()
    assert again[0] == again[1]
    assert "it has no 'x', 'z'" in fails(capsys, "generate", tmp_path / "folder", "--prompt", "zax")
    assert "top_p=2.0" in fails(capsys, "generate", tmp_path / "folder", "--prompt", "a", "--sample-top-p", "2")
    assert "11 different characters" in fails(capsys, *port[:2], tmp_path / "x", "--text", __file__)


def test_a_run_folder_of_training_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    state = makemoe_state()
    model = {"vocab_size": 11, "block_size": 4, "model_dim": 8, "num_heads": 2, "num_layers": 3, "num_experts": 4}
    (folder / "config.json").write_text(json.dumps({"settings": {}, "model": model, "text": {"vocabulary": TEXT}}))
    assert "must be a finished run" in fails(capsys, "inspect", folder)
    write_state(folder / "model.safetensors", state)
    assert main(["generate", str(folder), "--prompt", "abc", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert main(["port", str(folder), str(tmp_path / "out.safetensors")]) == 0
    verify(state, read_state(tmp_path / "out.safetensors"), tmp_path)


def _cut(path: Path) -> list[str]:
    path.write_bytes(path.read_bytes()[:-5])
    return ["is cut short"]


def _text(path: Path) -> list[str]:
    path.write_text("To be, or not to be")
    return ["must be a whole .safetensors file"]


def _other(path: Path) -> list[str]:
    write_state(path, {"wte.weight": np.zeros((2, 2), np.float32), "h.0.b": np.zeros(2, np.float32)}, overwrite=True)
    return ["makeMoE, Mixtral block, Switch layer or Soft MoE", "wte.weight", "h.0.b"]


def _faults(path: Path) -> list[str]:
    state = makemoe_state()
    del state["ln_f.bias"]
    state["extra"] = np.zeros(2, np.float32)
    state["lm_head.bias"] = np.zeros(7, np.float32)
    state["ln_f.weight"] = state["ln_f.weight"].astype(np.int32)
    write_state(path, state, overwrite=True)
    return [
        "1 missing: ln_f.bias", "1 unexpected: extra", "lm_head.bias is (7,), must be (11,)",
        "ln_f.weight is int32, must be float32",
    ]


def _mixed(path: Path) -> list[str]:
    state = makemoe_state()
    state["ln_f.bias"] = state["ln_f.bias"].astype(np.float16)
    write_state(path, state, overwrite=True)
    return ["1 mistyped: ln_f.bias is float16, must be float32"]


def _nan(path: Path) -> list[str]:
    state = makemoe_state()
    state["lm_head.bias"][3] = np.nan
    state["blocks.1.ln1.weight"][0] = np.inf
    write_state(path, state, overwrite=True)
    return ["NaN or infinity in", "lm_head.bias", "blocks.1.ln1.weight", "--allow-nonfinite"]


def _gone(path: Path) -> list[str]:
    path.unlink()
    return ["no such file"]


def _heads(path: Path) -> list[str]:
    state = {name: value for name, value in makemoe_state().items() if ".sa.heads." not in name}
    write_state(path, state, overwrite=True)
    return ["missing: blocks.0.sa.heads.0.key.weight"]


@pytest.mark.parametrize("spoil", [_cut, _text, _other, _faults, _mixed, _nan, _gone, _heads])
def test_bad_files(spoil: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.safetensors"
    write_state(source, makemoe_state())
    expected = spoil(source)
    line = fails(capsys, "port", source, tmp_path / "out")
    assert str(source) in line and all(words in line for words in expected), line
    assert [path.name for path in tmp_path.iterdir() if path != source] == []


def test_inspect_lists_names_even_of_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _nan(tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    assert capsys.readouterr().out.count("not finite") == 2
    _other(tmp_path / "b.safetensors")
    assert main(["inspect", str(tmp_path / "b.safetensors")]) == 1
    streams = capsys.readouterr()
    assert "wte.weight" in streams.out and streams.err.count("\n") == 1


def test_nan_passes_when_allowed(tmp_path: Path) -> None:
    _nan(tmp_path / "a.safetensors")
    assert main(["port", str(tmp_path / "a.safetensors"), str(tmp_path / "f"), "--allow-nonfinite"]) == 0
    assert main(["port", str(tmp_path / "f"), str(tmp_path / "b.safetensors"), "--allow-nonfinite"]) == 0
    verify(read_state(tmp_path / "a.safetensors"), read_state(tmp_path / "b.safetensors"), tmp_path)


def test_targets_that_may_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.safetensors"
    write_state(source, mixtral_state())
    kept = tmp_path / "kept.safetensors"
    kept.write_text("mine")
    assert "exists already; --overwrite" in fails(capsys, "port", source, kept)
    assert kept.read_text() == "mine"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    assert "exists already" in fails(capsys, "port", source, mine)
    assert "is not a checkpoint; it is not replaced" in fails(capsys, "port", source, mine, "--overwrite")
    assert (mine / "thesis.txt").read_text() == "mine"
    assert "is not a folder" in fails(capsys, "port", source, tmp_path / "no" / "b.safetensors")
    assert "is not a folder" in fails(capsys, "port", source, kept / "b")
    assert "must end in one of" in fails(capsys, "port", source, tmp_path / "b.npz")
    assert "cannot be written" in fails(capsys, "port", source, tmp_path / ("x" * 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "kept.safetensors", "mine"]
    assert main(["port", str(source), str(kept), "--overwrite"]) == 0
    assert main(["port", str(source), str(tmp_path / "f")]) == 0
    assert main(["port", str(source), str(tmp_path / "f"), "--overwrite"]) == 0
    verify(mixtral_state(), load(tmp_path / "f").state(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "f", "kept.safetensors", "mine"]


def test_settings_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.safetensors"
    write_state(source, mixtral_state())
    assert "top_k=9: must be at most num_experts=4" in fails(capsys, "port", source, tmp_path / "f", "--top-k", "9")
    assert "dropout: must be a setting of mixtral" in fails(capsys, "port", source, tmp_path / "f", "--dropout", "0.1")
    assert main(["port", str(source), str(tmp_path / "f")]) == 0
    capsys.readouterr()
    assert "top_k: must be left out for a folder" in fails(capsys, "port", tmp_path / "f", tmp_path / "g", "--top-k", "1")
    assert "must be a makeMoE language model" in fails(capsys, "generate", tmp_path / "f")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be JSON"),
        ("{}", 'must say "format"'),
        (None, "has no config.json"),
        ('{"format": "jax_moe", "version": 1, "family": "gpt2"}', "family='gpt2': must be one of"),
        (
            '{"format": "jax_moe", "version": 1, "family": "mixtral", "config": {"model_dim": 8}}',
            "missing expert_dim, num_experts, top_k",
        ),
    ],
)
def test_bad_folders(content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(tmp_path / "a.safetensors", mixtral_state())
    assert main(["port", str(tmp_path / "a.safetensors"), str(tmp_path / "f")]) == 0
    capsys.readouterr()
    if content is None:
        (tmp_path / "f" / "config.json").unlink()
    else:
        (tmp_path / "f" / "config.json").write_text(content)
    assert words in fails(capsys, "inspect", tmp_path / "f")


def test_a_folder_whose_weights_are_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(tmp_path / "a.safetensors", mixtral_state())
    assert main(["port", str(tmp_path / "a.safetensors"), str(tmp_path / "f")]) == 0
    capsys.readouterr()
    weights = read_state(tmp_path / "f" / "weights.safetensors")
    weights["other"] = weights.pop("router.kernel")
    weights["experts.up"] = weights["experts.up"][:, :, :2].copy()
    write_state(tmp_path / "f" / "weights.safetensors", weights, overwrite=True)
    line = fails(capsys, "inspect", tmp_path / "f")
    for words in ("missing: router.kernel", "unexpected: other", "experts.up is (4, 8, 2), must be (4, 8, 6)"):
        assert words in line


def test_the_module_runs_and_the_command_line_is_checked(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-W", "error", "-m", "jax_moe", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    broken = run("port", str(tmp_path / "no.safetensors"), str(tmp_path / "out"))
    assert broken.returncode == 1 and broken.stdout == ""
    assert broken.stderr == f"jax-moe: error: {tmp_path / 'no.safetensors'}: no such file\n"
    unknown = run("prot", "a", "b")
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr


def test_without_torch_pt_files_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what import does where it is not installed
    write_state(tmp_path / "a.safetensors", makemoe_state())
    (tmp_path / "a.pt").write_bytes(b"x")
    assert "needs PyTorch" in fails(capsys, "port", tmp_path / "a.pt", tmp_path / "f")
    assert "needs PyTorch" in fails(capsys, "port", tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert "needs PyTorch" in fails(capsys, "parity", tmp_path / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.safetensors"]
