"""`jax_moe.load` reads every form and `jax_moe.save` writes it; where saving may write. Needs no torch."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.disk import verify
from jax_moe.porting.formats.state_file import read_state, write_state
from moe_cli.main import main
from parity_tests.cli.commands import names
from parity_tests.porting.decoder_cases import decoder, weights
from parity_tests.porting.porting_cases import makemoe_state
from parity_tests.shared.compare import check_exact

SIZES = {"model_dim": 8, "expert_dim": 6, "num_experts": 4}
MODELS: dict[str, Any] = {
    "makemoe": lambda: jax_moe.MakeMoE(
        jax_moe.MakeMoEConfig(vocab_size=5, block_size=4, model_dim=8, num_heads=2, num_layers=2), rngs=nnx.Rngs(0)
    ),
    "mixtral": lambda: jax_moe.MoE(presets.mixtral(**SIZES, top_k=3), rngs=nnx.Rngs(0)),
    "makemoe_layer": lambda: jax_moe.MoE(presets.makemoe(**SIZES, top_k=2, capacity_factor=None), rngs=nnx.Rngs(0)),
    "switch": lambda: jax_moe.MoE(
        presets.switch(**SIZES, expert_capacity=3, balance_per_sequence=True), rngs=nnx.Rngs(0)
    ),
    "soft_moe": lambda: jax_moe.SoftMoE(
        jax_moe.SoftMoEConfig(model_dim=8, num_experts=2, num_slots=3), rngs=nnx.Rngs(0)
    ),
    "moe": lambda: jax_moe.MoE(presets.deepseek_v3(**SIZES, top_k=2, num_clusters=2, top_clusters=1), rngs=nnx.Rngs(0)),
}
FILES = {
    "makemoe": {"top_k": 2, "capacity_factor": 1.0, "dropout": 0.1}, "mixtral": {"top_k": 3},
    "makemoe_layer": {"top_k": 2, "capacity_factor": "none", "dropout": 0.1}, "switch": {"expert_capacity": 3},
    "soft_moe": {"hidden_activation": "relu", "output_activation": "identity", "residual": True},
}


def numbers(model: nnx.Module) -> dict[str, np.ndarray]:
    """{our path: array}."""
    return {".".join(map(str, keys)): np.asarray(v[...]) for keys, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_and_a_file_of_every_family(family: str, tmp_path: Path) -> None:
    model = MODELS[family]()
    jax_moe.save(model, tmp_path / "new" / "folder")
    again = jax_moe.load(tmp_path / "new" / "folder")
    assert again.config == model.config and type(again) is type(model)
    check_exact(numbers(again), numbers(model), "folder")
    file = tmp_path / "other" / "model.safetensors"
    if family not in FILES:
        with pytest.raises(ValueError, match="must be a folder: its contract is of no family"):
            jax_moe.save(model, file)
        assert names(tmp_path) == {"new"}
        return
    jax_moe.save(model, file)
    again = jax_moe.load(file, **FILES[family])  # nothing is assumed, so nothing is warned of
    assert again.config == model.config
    check_exact(numbers(again), numbers(model), "file")


def test_what_a_file_does_not_say_is_a_warning(tmp_path: Path) -> None:
    jax_moe.save(MODELS["makemoe"](), tmp_path / "model.safetensors")
    with pytest.warns(
        UserWarning, match=r"assumed was capacity_factor=1\.0, dropout=0\.1; jax_moe\.load\(path, capacity"
    ):
        assert jax_moe.load(tmp_path / "model.safetensors", top_k=1).config.top_k == 1
    with pytest.raises(ValueError, match=r"topk: must be one of top_k"):
        jax_moe.load(tmp_path / "model.safetensors", topk=1)
    jax_moe.save(MODELS["makemoe"](), tmp_path / "folder", characters="abcde")
    with pytest.raises(ValueError, match="top_k: must be left out for a folder"):
        jax_moe.load(tmp_path / "folder", top_k=1)
    with pytest.raises(ValueError, match="no such file"):
        jax_moe.load(tmp_path / "nothing")


def test_a_decoder_in_every_form(whole: Path, orbax: Path, tmp_path: Path) -> None:
    one, two = jax_moe.load(whole), jax_moe.load(orbax)
    check_exact(numbers(one), numbers(two), "Orbax")
    jax_moe.save(one, tmp_path / "saved")
    check_exact(weights(tmp_path / "saved"), weights(whole), "saved")
    assert {v.dtype.name for v in numbers(jax_moe.load(whole, "bfloat16")).values()} == {"bfloat16"}
    with pytest.raises(ValueError, match=r"must be a folder for a Hugging Face model, without the ending \.pt"):
        jax_moe.save(one, tmp_path / "saved.pt")
    with pytest.raises(ValueError, match="model_type=None: must be one of"):
        jax_moe.save(decoder("mixtral"), tmp_path / "x")
    with pytest.raises(ValueError, match="dtype='int8'"):
        jax_moe.load(orbax, "int8")


def test_where_saving_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers: an empty folder and missing parents are fine; replacing a checkpoint needs overwrite=True."""
    model = decoder("mixtral")

    def save(place: Path, **settings: Any) -> None:
        jax_moe.save_pretrained(model, place, model_type="mixtral", **settings)

    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    save(tmp_path / "a" / "b" / "c")
    check_exact(weights(tmp_path / "empty"), weights(tmp_path / "a" / "b" / "c"), "saved")
    with pytest.raises(ValueError, match=r"empty: exists already; overwrite=True replaces it$"):
        save(tmp_path / "empty")
    save(tmp_path / "empty", overwrite=True)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and is not a checkpoint; it must be new, empty or a checkpoint"):
            save(tmp_path / "mine", overwrite=overwrite)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="must not be the working folder"):
        save(Path("."))
    with pytest.raises(ValueError, match="cannot be written"):
        save(tmp_path / ("x" * 300))
    monkeypatch.setattr("jax_moe.porting.pretrained.write_weights", _full)
    with pytest.raises(ValueError, match="No space left on device"):
        save(tmp_path / "p" / "q" / "r")
    assert names(tmp_path) == {"empty", "a", "real", "link", "mine", "here"} and names(tmp_path / "mine") == {
        "thesis.txt"
    }
    assert names(tmp_path / "here") == set()


def _full(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def test_the_command_line_speaks_its_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = makemoe_state()
    write_state(tmp_path / "a.safetensors", state)
    assert main(["port", str(tmp_path / "a.safetensors"), str(tmp_path / "a.safetensors")]) == 1
    assert capsys.readouterr().err.endswith("exists already; --overwrite replaces it\n")
    state["lm_head.bias"][0] = np.nan
    write_state(tmp_path / "b.safetensors", state)
    assert main(["port", str(tmp_path / "b.safetensors"), str(tmp_path / "c")]) == 1
    assert "--allow-nonfinite takes them" in capsys.readouterr().err
    with pytest.raises(ValueError, match="allow_nonfinite=True takes them"):
        jax_moe.load(tmp_path / "b.safetensors")


def test_what_was_assumed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By every command, for every family that leaves something open, with the option; and not when it is given."""
    text = "abcdefghijk"
    (tmp_path / "text.txt").write_text(text)
    file = tmp_path / "a.safetensors"
    write_state(file, makemoe_state())
    published = "top_k=2 (--top-k), capacity_factor=1.0 (--capacity-factor), dropout=0.1 (--dropout)"
    said = f"assumed, as the file does not store them: {published}\n"
    assert main(["inspect", str(file)]) == 0
    assert said in capsys.readouterr().out
    generate = ["generate", str(file), "--text", str(tmp_path / "text.txt"), "--prompt", "ab", "--max-new-tokens", "2"]
    assert main(generate) == 0
    streams = capsys.readouterr()
    assert said in streams.err and len(streams.out) == 5
    assert main(["port", str(file), str(tmp_path / "folder")]) == 0
    assert said in capsys.readouterr().err
    assert main([*generate, "--top-k", "1", "--capacity-factor", "none"]) == 0
    assert "store them: dropout=0.1 (--dropout)\n" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "folder")]) == 0
    assert "assumed" not in capsys.readouterr().out
    for family, words in (
        ("mixtral", "top_k=2 (--top-k)\n"), ("switch", "expert_capacity=64 (--expert-capacity)\n"),
        ("makemoe_layer", f"{published}\n"),
        (
            "soft_moe",
            "hidden_activation=relu (--hidden-activation), output_activation=identity (--output-activation), ",
        ),
    ):
        jax_moe.save(MODELS[family](), tmp_path / f"{family}.safetensors")
        assert main(["inspect", str(tmp_path / f"{family}.safetensors")]) == 0
        assert f"store them: {words}" in capsys.readouterr().out
    verify(makemoe_state(), read_state(file), tmp_path)


def test_version_and_near_misses(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jax-moe {jax_moe.__version__}\n"
    with pytest.raises(SystemExit), warnings.catch_warnings():
        main(["parity", str(whole), "--train", "3", "--lr", "3"])
    assert capsys.readouterr().err.endswith("jax-moe: --lr is called --learning-rate here\n")
    tokens = ["generate", str(whole), "--tokens", "1,2", "--max-new-tokens", "2"]
    assert main([*tokens, "--sample-top-p", "0.5"]) == 0 and main([*tokens, "--top-p", "0.5"]) == 0
    one, two = capsys.readouterr().out.split()
    assert one == two
    assert main([*tokens, "--top-k", "5"]) == 1
    assert "--sample-top-k 5 samples from the 5 most likely tokens" in capsys.readouterr().err
