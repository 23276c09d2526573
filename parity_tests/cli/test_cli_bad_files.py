"""`jax-moe` on files that are broken, places that may not be written and settings that do not fit: one clear line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jax_moe.disk import verify
from jax_moe.porting.checkpoint import load
from jax_moe.porting.formats.state_file import read_state, write_state
from moe_cli.main import main
from parity_tests.cli.commands import fails
from parity_tests.porting.porting_cases import makemoe_state, mixtral_state


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
    out = capsys.readouterr().out
    assert "not finite: " in out and out.split("not finite: ")[1].count(",") == 1
    _other(tmp_path / "b.safetensors")
    assert main(["inspect", str(tmp_path / "b.safetensors"), "--names"]) == 1
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
    assert "top_k: must be left out for a folder" in fails(
        capsys, "port", tmp_path / "f", tmp_path / "g", "--top-k", "1"
    )
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
