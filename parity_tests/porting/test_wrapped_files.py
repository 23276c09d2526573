"""Names lengthened by wrappers, adapters, contracts too large to build: what is seen without PyTorch."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_moe
from jax_moe.config.moe import CapacityConfig
from jax_moe.porting.formats.safetensors import map_tensors, read_safetensors, write_safetensors
from jax_moe.porting.formats.state_file import write_state
from jax_moe.porting.formats.wrapped import open_dictionary, own_names
from jax_moe.porting.optimizer import own_file
from jax_moe.porting.optimizer.own_file import plain
from moe_cli.main import main
from moe_parity.batch import read_tokens
from parity_tests.cli.commands import fails, run
from parity_tests.porting.porting_cases import makemoe_state, mixtral_state


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["a.weight", "b"], []),
        (["_orig_mod.phi"], ["_orig_mod."]),
        (["module.phi", "module.experts.0.x"], ["module."]),
        (["module._orig_mod.model.phi"], ["_orig_mod.", "module.", "model."]),
        (
            ["blocks.0._orig_mod.smoe.x", "blocks.1._fsdp_wrapped_module.smoe.x"],
            ["_fsdp_wrapped_module.", "_orig_mod."],
        ),
        (["model.a", "model.b"], []),  # nothing that is known comes out: it stays
        (["model.layers.0.a", "model.norm"], []),
        (["module.phi", "other"], []),
    ],
)
def test_what_is_taken_from_names(names: list[str], taken: list[str]) -> None:
    def known(found: set[str]) -> bool:
        return any(name == "phi" or ".smoe." in name for name in found)

    found, words = own_names(names, known)
    assert words == taken and list(found) == names
    assert taken or list(found.values()) == names
    whole = [name for name in found.values() if "_orig_mod" in name or name.startswith(("module.", "model."))]
    assert not taken or whole == []


def test_a_dictionary_says_what_stood_beside() -> None:
    opened = open_dictionary({"state_dict": {"w": 1}, "optimizer_states": [], "epoch": 3})
    assert opened.state == {"w": 1} and opened.optimizer is None
    assert opened.note == 'from "state_dict" of a dictionary (beside it: epoch, optimizer_states)'
    opened = open_dictionary({"model": {"module": {"w": 1}}, "optim": {"state": {}}})
    assert opened.note == 'from "model.module" of a dictionary (beside it: the optimizer\'s state)' and opened.optimizer
    assert open_dictionary({"w": 1}).note is None
    around: dict[str, Any] = {}
    around["model"] = around  # in itself
    assert open_dictionary(around).within.count("model") < 20


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model._orig_mod."])
def test_a_hugging_face_folder_with_a_wrapper_in_its_names(
    prefix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = jax_moe.load_pretrained(folder)
    for file in folder.glob("model-*.safetensors"):
        write_safetensors(
            file, {f"{prefix}{name}": value for name, value in read_safetensors(file).items()}, {"format": "pt"}
        )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"{prefix}{name}": file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    printed = run(capsys, "inspect", folder)
    assert "names without" in printed and all(f"{part}." in printed for part in prefix.split(".")[:-1])
    with pytest.warns(UserWarning, match="names without"):
        model = jax_moe.load_pretrained(folder)
    assert np.array_equal(model.embedding[...], whole.embedding[...])
    assert main(["port", str(folder), str(tmp_path / "to"), "--to", "hf"]) == 0
    assert "names without" in capsys.readouterr().err
    assert "model.norm.weight" in map_tensors(tmp_path / "to" / "model.safetensors")


def test_an_adapter_beside_a_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would add it to the weights."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    for command in ("inspect", "parity", "generate"):
        assert "merge_and_unload()" in fails(capsys, command, folder)


@pytest.mark.parametrize("factor", ["1e99999999", "1/0", "9" * 3000, "1e-99999999"])
def test_a_factor_that_would_take_for_ever(factor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(tmp_path / "a.safetensors", mixtral_state())
    assert main(["port", str(tmp_path / "a.safetensors"), str(tmp_path / "f"), "--top-k", "2"]) == 0
    capsys.readouterr()
    values = json.loads((tmp_path / "f" / "config.json").read_text())
    values["config"]["capacity"] = {"factor": factor}
    (tmp_path / "f" / "config.json").write_text(json.dumps(values))
    assert "must be a number above 0" in fails(capsys, "inspect", tmp_path / "f")


def test_factors_that_people_write_are_still_read() -> None:
    for factor in ("29/100", "0.29", "1e-2", "1.25", 1e-300, 1e300):
        assert CapacityConfig(factor=factor).exact_factor > 0


def test_a_long_block_does_not_make_a_mask_beyond_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: value for name, value in makemoe_state().items() if not name.endswith("tril")}
    state["position_embedding_table.weight"] = np.zeros((500_000, 8), np.float32)
    write_state(tmp_path / "a.safetensors", state)
    line = fails(capsys, "inspect", tmp_path / "a.safetensors")
    assert "a mask of 500,000 by 500,000 needs about 3,000,000,000,000 bytes of memory" in line


def test_a_runs_characters_are_a_string_of_its_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(tmp_path / "model.safetensors", makemoe_state())
    model = {
        "vocab_size": 11, "block_size": 4, "model_dim": 8, "num_heads": 2, "num_layers": 3, "num_experts": 4, "top_k": 2
    }
    for vocabulary, said in (
        ("abcdefghijk", None), (7, "text.vocabulary: must be vocab_size=11"), ("abc", "different char")
    ):
        about = {"settings": {}, "model": model, "text": {"vocabulary": vocabulary}}
        (tmp_path / "config.json").write_text(json.dumps(about))
        if said is None:
            assert "makemoe" in run(capsys, "inspect", tmp_path)
        else:
            assert said in fails(capsys, "inspect", tmp_path)


def test_what_is_plain_is_told_without_writing_it_out() -> None:
    twice: list[Any] = [0]
    for _ in range(60):
        twice = [twice, twice]  # 2^60 numbers in words
    round_: list[Any] = []
    round_.append(round_)
    assert plain({"a": [1, "x", None, 0.5]}) and not plain(twice) and not plain(round_)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"}, {"step": 10**30}, {"step_dtype": []}, {"step_dtype": "int8"}, {"words": "x"}, {"order": [1]},
        {"others": []}, {"groups": [{"params": ["a"]}]}, {"groups": {}}, {"groups": [{"params": [0], "betas": 3}]},
    ],
)
def test_metadata_of_an_optimizer_that_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    said = {
        "step": 3, "step_dtype": "float32", "groups": [{"lr": 0.1, "betas": [0.9, 0.99], "params": [0]}],
        "order": ["a"], "others": {}, "words": ["exp_avg"],
    }
    arrays = {"exp_avg.a": np.ones(2, np.float32)}
    for text, fits in ((json.dumps(said), True), (json.dumps(said | change), False), ("[" * 100_000, False)):
        write_safetensors(tmp_path / "o.safetensors", arrays, {own_file.KEY: text})
        if fits:
            assert own_file._read(tmp_path / "o.safetensors")[1]["step"] == 3
        else:
            with pytest.raises(ValueError, match="must say step, groups, order and words"):
                own_file._read(tmp_path / "o.safetensors")


def test_the_batch_of_parity_is_read_by_the_guarded_reader(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.arange(3))
    shutil.move(tmp_path / "x.npz", tmp_path / "x.npy")
    with pytest.raises(ValueError, match="is an archive"):
        read_tokens(tmp_path / "x.npy")


def test_names_twice_in_a_header_are_cut(tmp_path: Path) -> None:
    name = "y" * 9000
    one = f'"{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    text = f"{{{one},{one}}}"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(ValueError, match="must be a whole") as caught:
        map_tensors(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 1000
