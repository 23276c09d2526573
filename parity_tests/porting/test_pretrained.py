"""Hugging Face folders without Hugging Face: names on disk, round trips, and every kind of broken folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import DecoderConfig
from jax_moe.config.attention import RopeConfig
from jax_moe.porting import PortError, pretrained
from jax_moe.porting.families import FAMILIES
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from parity_tests.porting.broken_folders import BROKEN
from parity_tests.porting.decoder_cases import CONFIGS, SIZES, decoder, weights
from parity_tests.shared.compare import check_exact


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_round_trip(model_type: str, dtype: str, tmp_path: Path) -> None:
    model = decoder(model_type, dtype)
    jax_moe.save_pretrained(model, tmp_path / "one", model_type=model_type, max_shard_bytes=3000)
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    loaded = jax_moe.load_pretrained(tmp_path / "one")
    assert loaded.config == model.config
    assert {v.dtype.name for _, v in nnx.to_flat_state(nnx.state(loaded))} == {dtype}
    jax_moe.save_pretrained(loaded, tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    check_exact(two, one, "saved again")
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "two" / "config.json").read_bytes() == (tmp_path / "one" / "config.json").read_bytes()
    assert not (tmp_path / "two" / "model.safetensors.index.json").exists()
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in one.values())


def test_names_and_orientation() -> None:
    """Checked by hand, not by the tables: layer 2, expert 3. Layer 1 is dense, so layer 2 holds the second mixture."""
    model = decoder("qwen2_moe")
    state = jax_moe.to_torch(model, layout="hf_qwen2_moe")
    experts, attention = model.moe.experts, model.blocks.attention
    assert (state["model.layers.2.mlp.experts.3.gate_proj.weight"] == experts.gate[...][1, 3].T).all()
    assert (state["model.layers.2.mlp.experts.3.down_proj.weight"] == experts.down[...][1, 3].T).all()
    assert (state["model.layers.2.mlp.shared_expert.up_proj.weight"] == model.moe.shared.up[...][1, 0].T).all()
    assert (state["model.layers.1.mlp.up_proj.weight"] == model.dense.up[...][0, 0].T).all()
    assert (state["model.layers.1.self_attn.q_proj.weight"] == attention.query[...][1].reshape(8, 16).T).all()
    assert (state["lm_head.weight"] == model.head[...].T).all()
    assert "model.layers.1.mlp.gate.weight" not in state and "model.layers.0.mlp.up_proj.weight" not in state
    fused = jax_moe.to_torch(model, layout="hf_qwen2_moe_fused")
    gate_up = np.concatenate([experts.gate[...][0].swapaxes(1, 2), experts.up[...][0].swapaxes(1, 2)], axis=1)
    assert (fused["model.layers.0.mlp.experts.gate_up_proj"] == gate_up).all()


def test_another_dtype_is_said_in_the_config(tmp_path: Path, folder: Path) -> None:
    model = jax_moe.load_pretrained(folder, dtype="bfloat16")
    jax_moe.save_pretrained(model, tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {value.dtype.name for value in weights(tmp_path / "narrow").values()} == {"bfloat16"}


def test_older_rotary_settings() -> None:
    values = FAMILIES["mixtral"].values(DecoderConfig.grouped(**(SIZES | CONFIGS["mixtral"])))
    del values["rope_parameters"]
    old = values | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8}}
    assert FAMILIES["mixtral"].config(old).rope == RopeConfig(kind="linear", theta=5e5, factor=8.0, max_positions=2048)
    assert FAMILIES["mixtral"].config(values).rope.theta == 1e6


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_refused(name: str, folder: Path) -> None:
    BROKEN[name][0](folder)
    with pytest.raises(ValueError, match=BROKEN[name][1]) as caught:
        jax_moe.load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_all_faults_of_the_weights_at_once(folder: Path) -> None:
    model = decoder("qwen2_moe")
    state = jax_moe.to_torch(model, layout="hf_qwen2_moe")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    del state["model.norm.weight"]
    state["more"] = np.ones(1, np.float32)
    state["lm_head.weight"] = np.ones((2, 2), np.float32)
    write_safetensors(folder / "model.safetensors", state)
    with pytest.raises(PortError) as caught:
        jax_moe.load_pretrained(folder)
    error = caught.value
    assert error.missing == ["model.norm.weight"] and error.unexpected == ["more"]
    assert error.misshapen == ["lm_head.weight is (2, 2), must be (11, 8)"]


def test_arguments_that_are_refused(folder: Path, tmp_path: Path) -> None:
    model = jax_moe.load_pretrained(folder)
    file = tmp_path / "file"
    file.write_text("")
    for refused, message in (
        (lambda: jax_moe.load_pretrained(file), "file: must be a folder"),
        (lambda: jax_moe.load_pretrained(tmp_path / "nowhere"), "nowhere: no such folder"),
        (lambda: jax_moe.load_pretrained(folder, dtype="int8"), "dtype='int8': must be None, float64"),
        (lambda: jax_moe.load_pretrained(folder, dtype="float64"), "jax would narrow the dtype"),
        (lambda: jax_moe.save_pretrained(model, file), "file: exists already"),
        (lambda: jax_moe.save_pretrained(model, file, overwrite=True), "is not a checkpoint"),
        (lambda: jax_moe.save_pretrained(model, folder), "exists already; overwrite=True replaces it"),
        (lambda: jax_moe.save_pretrained(model, file / "where"), "cannot be written"),
        (
            lambda: jax_moe.save_pretrained(decoder("mixtral"), tmp_path / "x"),
            "model_type=None: must be one of mixtral",
        ),
        (
            lambda: jax_moe.save_pretrained(decoder("qwen3_moe"), tmp_path / "x", model_type="mixtral"),
            "say .*dense_layers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert {p.name for p in tmp_path.iterdir()} == {"file", "model"}


def test_overwriting_the_folder_it_came_from(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    before = weights(folder)
    jax_moe.save_pretrained(jax_moe.load_pretrained(folder), folder, overwrite=True)
    check_exact(weights(folder), before, "overwritten")
    assert (folder / "tokenizer.json").exists() and len(list(folder.glob("*.safetensors"))) == 1


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    model = jax_moe.load_pretrained(folder)
    monkeypatch.setattr(pretrained, "copy_others", fail)
    with pytest.raises(ValueError, match="No space left on device"):
        jax_moe.save_pretrained(model, tmp_path / "full")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tied_head_stored_all_the_same(tmp_path: Path) -> None:
    jax_moe.save_pretrained(decoder("granitemoe"), tmp_path / "tied", model_type="granitemoe")
    file = tmp_path / "tied" / "model.safetensors"
    state = read_safetensors(file)
    write_safetensors(file, state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    jax_moe.load_pretrained(tmp_path / "tied")
    write_safetensors(file, state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1})
    with pytest.raises(PortError, match=r"1 wrong: lm_head\.weight must be model\.embed_tokens\.weight"):
        jax_moe.load_pretrained(tmp_path / "tied")
