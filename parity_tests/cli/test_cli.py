"""`jax-moe` on the small families: what it writes and prints; needs no torch."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_moe import presets
from jax_moe.disk import verify
from jax_moe.porting.checkpoint import load
from jax_moe.porting.formats.state_file import read_state, write_state
from moe_cli.main import main
from parity_tests.cli.commands import fails
from parity_tests.porting.porting_cases import STATES, drawn, makemoe_state, mixtral_state


def switch_state(dtype: str = "float32") -> dict[str, np.ndarray]:
    """Switch Transformers' sparse layer as transformers names it: 4 experts, width 8, expert width 6."""
    experts = {
        f"experts.expert_{e}.{name}.weight": shape for e in range(4) for name, shape in (("wi", (6, 8)), ("wo", (8, 6)))
    }
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
        "the best 2 of 4, then softmax over them, with bias",
        "learned softplus noise on the logits, also at evaluation",
        "floor(tokens K / experts * 1.0)", "tensors: ", "; --names lists them",
    ):
        assert words in out, words
    assert "experts.3.net.0" not in out
    assert main(["inspect", str(tmp_path / "a.safetensors"), "--names"]) == 0
    out = capsys.readouterr().out
    assert "blocks.2.smoe.experts.3.net.0.weight" in out and "[32, 8]" in out


def test_a_switch_layer_and_its_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Capacity: transformers' 64 slots by default, a number, the paper's factor, dropless. bf16 and a bias survive."""
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
        ([], "capacity: 64 slots per expert over one sequence, however long, in token order"),
        (["--expert-capacity", "3"], "capacity: 3 slots per expert over one sequence"),
        (["--capacity-factor", "1.25"], "capacity: ceil(tokens / experts * 1.25) slots per expert over one sequence"),
        (["--capacity-factor", "none"], "capacity: a slot for every token of one sequence, nothing is dropped"),
    ):
        assert main(["inspect", str(source), *arguments]) == 0
        out = capsys.readouterr().out
        assert words in out and "balance loss: of each sequence, then their mean" in out, out
    both = ["--expert-capacity", "3", "--capacity-factor", "1"]
    assert "capacity_factor, expert_capacity: must be one of the two" in fails(capsys, "inspect", source, *both)
    none = "capacity_factor=0.0: must be a number above 0, or none (nothing is dropped)"
    assert none in fails(capsys, "inspect", source, "--capacity-factor", "0")
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
    assert "the model has no 'x', 'z'" in fails(capsys, "generate", tmp_path / "folder", "--prompt", "zax")
    assert "top_p=2.0" in fails(capsys, "generate", tmp_path / "folder", "--prompt", "a", "--sample-top-p", "2")
    assert "11 different characters" in fails(capsys, *port[:2], tmp_path / "x", "--text", __file__)


def test_a_run_folder_of_training_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    state = makemoe_state()
    model = {"vocab_size": 11, "block_size": 4, "model_dim": 8, "num_heads": 2, "num_layers": 3, "num_experts": 4}
    (folder / "config.json").write_text(json.dumps({"settings": {}, "model": model, "text": {"vocabulary": TEXT}}))
    assert "is a run without weights yet" in fails(capsys, "inspect", folder)
    write_state(folder / "model.safetensors", state)
    assert main(["generate", str(folder), "--prompt", "abc", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert main(["port", str(folder), str(tmp_path / "out.safetensors")]) == 0
    verify(state, read_state(tmp_path / "out.safetensors"), tmp_path)


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
