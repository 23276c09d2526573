"""Files of other projects and hostile files: each is read or refused with a sentence that says what it is."""

import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_moe
from jax_moe.porting.checkpoint import Checkpoint, load, save
from jax_moe.porting.formats.safetensors import write_safetensors
from jax_moe.porting.formats.wrapped import unwrapped, without_parts
from parity_tests.porting.decoder_cases import decoder
from parity_tests.porting.porting_cases import make, makemoe_state, mixtral_state

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def refused(path: Path, **settings: Any) -> str:
    """The one line of a checkpoint that must not load, and in little memory."""
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        load(path, **settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000 and peak < 200e6
    return message


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_prefixes_of_wrappers_are_taken_off_and_said(prefix: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {prefix + name: value for name, value in mixtral_state().items()})
    found = load(tmp_path / "x.safetensors")
    assert found.family == "mixtral" and found.note is not None
    assert all(part in found.note for part in prefix.split(".")[:-1])
    for name, value in mixtral_state().items():
        assert np.array_equal(found.state()[name], value)


def test_a_compiled_submodule_inside_a_name_and_names_that_meet() -> None:
    state = {"blocks.0._orig_mod.smoe.x": 1, "ln_f.weight": 2}
    assert without_parts(state) == ({"blocks.0.smoe.x": 1, "ln_f.weight": 2}, ["_orig_mod."])
    with pytest.raises(ValueError, match="two names are the same without it"):
        without_parts({"_orig_mod.x": 1, "x": 2})


@pytest.mark.parametrize("keys", [("state_dict",), ("model_state_dict",), ("module", "state_dict"), ("checkpoint", )])
def test_dictionaries_around_a_state_dict_are_unwrapped(keys: tuple[str, ...]) -> None:
    whole: Any = {"w": 1}
    for key in reversed(keys):
        whole = {key: whole, "epoch": 3}
    assert unwrapped(whole) == ({"w": 1} if keys != ("checkpoint",) else whole)


def test_git_lfs_pointers_and_adapters_are_named(tmp_path: Path) -> None:
    jax_moe.save_pretrained(decoder("mixtral"), tmp_path / "it", model_type="mixtral")
    for name in ("model.safetensors", "config.json"):
        folder = Path(shutil.copytree(tmp_path / "it", tmp_path / f"without_{name}"))
        (folder / name).write_text(LFS)
        assert "is a Git LFS pointer" in refused(folder)
    (tmp_path / "x.safetensors").write_text(LFS)
    assert "is a Git LFS pointer" in refused(tmp_path / "x.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refused(tmp_path / "adapter")


def test_a_folder_saved_twice_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """The single file counts where an index lies beside it (transformers' modeling_utils looks for it first)."""
    jax_moe.save_pretrained(decoder("mixtral"), tmp_path / "it", model_type="mixtral")
    expected = load(tmp_path / "it").weights
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "it" / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load(tmp_path / "it").weights
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": []}, "family=[]: must be one of"),
        ({"family": "x" * 10_000}, "xxx...xxx"),
        ({"storage": {}}, "storage={}: must be one of"),
        ({"config": {"num_experts": 10**9}}, "the contract asks for"),
        ({"config": {"num_layers": 10**9}}, "the contract asks for"),
        ({"config": {"vocab_size": 10**12}}, "the contract asks for"),
        ({"config": {"dropout": "0.1"}}, "config.dropout='0.1': must be"),
        ({"config": {"dropout": float("nan")}}, "dropout=nan: must be"),
        ({"config": {"x" * 10_000: 1}}, "unknown xxx"),
        ({"config": []}, "config=[]: must be an object"),
    ],
)
def test_our_own_config_out_of_shape(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    save(Checkpoint("makemoe", make("makemoe")), tmp_path / "it")
    file = tmp_path / "it" / "config.json"
    about = json.loads(file.read_text())
    inner = change.get("config")
    whole = {"config": {**about["config"], **inner}} if isinstance(inner, dict) else {}
    file.write_text(json.dumps({**about, **change, **whole}))
    assert said.replace("xxx...xxx", "x" * 50) in refused(tmp_path / "it")


def test_a_name_that_says_a_billion_layers(tmp_path: Path) -> None:
    state = makemoe_state()
    state["blocks.999999999.ln1.weight"] = state.pop("blocks.2.ln1.weight")
    write_safetensors(tmp_path / "x.safetensors", state)
    assert "blocks.999999999.ln1.weight" in refused(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1' + "0" * 400 + "}", "\ufeff{}", "nul", "[]", '"x"', "1e999"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_made_to_hurt(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / name).write_text(text)
    assert "must " in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E4M3", "F8_E5M2"])
def test_a_dtype_that_numpy_lacks(dtype: str, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert f"w is {dtype}" in refused(tmp_path / "x.safetensors")
