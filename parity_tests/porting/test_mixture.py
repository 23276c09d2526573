"""`load_moe`, `moe_layers` and `save_moe`: one layer of a folder, whatever stands around it."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe.porting import PortError
from jax_moe.porting.families import FAMILIES
from jax_moe.stored import stored_variables
from parity_tests.porting.decoder_cases import weights
from parity_tests.porting.mixture_folders import CONTRACT, LAYERS, deepseek, mixture
from parity_tests.shared.compare import MismatchError, check_exact


def held(moe: jax_moe.MoE) -> dict[str, np.ndarray]:
    return {path: np.asarray(v[...]) for path, v in stored_variables(moe).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A DeepSeek-V3 folder."""
    return deepseek(tmp_path / "deepseek")


def test_one_layer_is_read_and_nothing_else(folder: Path) -> None:
    """The other layers' files may be gone; the layer of multi-token prediction is none of the decoder's."""
    assert jax_moe.moe_layers(folder) == LAYERS
    for layer in (0, 2, 3, 4):
        (folder / f"model-{layer}.safetensors").unlink()
    moe = jax_moe.load_moe(folder, 1)
    assert moe.config == CONTRACT
    check_exact(held(moe), held(mixture(1)), "layer 1")
    with pytest.raises(MismatchError):
        check_exact(held(moe), held(mixture(3)), "another layer")
    with pytest.raises(ValueError, match=r"model-3\.safetensors is missing"):
        jax_moe.load_moe(folder, 3)
    assert jax_moe.moe_layers(folder) == LAYERS


def test_the_layer_of_a_known_decoder(whole: Path) -> None:
    """The same numbers as in the whole model, dense layers apart."""
    model = jax_moe.load_pretrained(whole)
    assert jax_moe.moe_layers(whole) == model.config.moe_layers == (0, 2)
    for row, layer in enumerate(model.config.moe_layers):
        check_exact({"up": held(jax_moe.load_moe(whole, layer))["experts.up"]},
                    {"up": np.asarray(model.moe.experts.up[...])[row]}, f"layer {layer}")


def test_another_dtype(folder: Path) -> None:
    """The correction bias keeps its own."""
    moe = jax_moe.load_moe(folder, 1, dtype="bfloat16")
    assert moe.experts.up.dtype == moe.router.kernel.dtype == jnp.bfloat16
    assert moe.router.correction_bias.dtype == jnp.float32


# What is wrong, and what the one line says.
WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "a layer that is not there": ({}, 7, r"layer=7: must be one of 1, 3$"),
    "a layer without a mixture": ({}, 2, r"layer=2: must be one of 1, 3; layer 2 has no mixture$"),
    "an unknown type": ({"model_type": "cool"}, 1, r"config.json: model_type='cool': must be one of afmoe, "),
    "no type": ({"model_type": None}, 1, r"config.json: model_type=None: must be one of afmoe, "),
    "a missing size": ({"hidden_size": None}, 1, r"config.json: hidden_size is missing$"),
    "too many choices": ({"num_experts_per_tok": 5}, 1, r"num_experts_per_tok=5: must be at most 4, .*topk_group=2$"),
    "clusters that do not divide": ({"n_group": 4}, 1, r"n_group=4: must be a divisor of n_routed_experts=6$"),
    "an activation": ({"hidden_act": "gel"}, 1, r"hidden_act='gel': must be one of silu, swish, gelu, "),
    "quantised by nothing known": ({"quantization_config": {"bits": 4}}, 1, r"quant_method=None: must be one of fp8, "),
    "other sizes": ({"moe_intermediate_size": 5}, 1, r"misshapen: .*mlp\.experts\.0\.gate_proj\.weight is \(6, 8\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any weight is read."""
    settings, layer, said = WRONG[case]
    folder = deepseek(tmp_path / "wrong", **settings)
    monkeypatch.setattr("jax_moe.porting.mixture.place_all", None)
    with pytest.raises(ValueError, match=said) as caught:
        jax_moe.load_moe(folder, layer)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_layers_of_several_kinds() -> None:
    """DeepSeek-V4's that choose by a table of tokens and the others, by a list, a number or neither of them."""
    family = FAMILIES["deepseek_v4"]
    assert family.mixture is not None
    values = {
        "model_type": "deepseek_v4", "hidden_size": 8, "moe_intermediate_size": 6, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 5, "vocab_size": 11,
    }
    for said, by_table in (
        ({}, {0, 1, 2}), ({"num_hash_layers": 1}, {0}), ({"num_hash_layers": 0}, set()),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe", "moe"], "num_hash_layers": 4}, {1}),
    ):
        found = [family.mixture_config(values | said, layer).router for layer in range(5)]
        assert {i for i, router in enumerate(found) if router.table_tokens == 11} == by_table
        assert {i for i, router in enumerate(found) if router.correction_bias} == {0, 1, 2, 3, 4} - by_table
    with pytest.raises(ValueError, match=r"^mlp_layer_types='dense': must be one of moe, hash_moe$"):
        family.mixture_config(values | {"mlp_layer_types": ["dense"] * 5}, 0)
    with pytest.raises(ValueError, match=r"^vocab_size is missing$"):
        family.mixture_config({name: value for name, value in values.items() if name != "vocab_size"}, 0)


def test_missing_and_foreign_tensors_are_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    file = listed["weight_map"].pop("model.layers.1.mlp.experts.2.up_proj.weight")
    listed["weight_map"]["model.layers.1.mlp.extra.weight"] = file
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.extra\.weight"):
        jax_moe.load_moe(folder, 1)
    del listed["weight_map"]["model.layers.1.mlp.extra.weight"]
    listed["weight_map"]["model.layers.1.mlp.input_layernorm.weight"] = file
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="lacks"):
        jax_moe.load_moe(folder, 1)
    del listed["weight_map"]["model.layers.1.mlp.input_layernorm.weight"]
    index.write_text(json.dumps(listed))
    with pytest.raises(PortError) as caught:
        jax_moe.load_moe(folder, 1)
    assert caught.value.missing == ["model.layers.1.mlp.experts.2.up_proj.weight"]


@pytest.mark.parametrize("fused", [False, True])
def test_put_back(fused: bool, tmp_path: Path) -> None:
    """A layer that was trained: its tensors change, under the names that were there; all else keeps every bit."""
    folder, before = deepseek(tmp_path / "one", fused), deepseek(tmp_path / "two", fused)
    moe = jax_moe.load_moe(folder, 3)
    jax_moe.save_moe(moe, folder, 3)
    same = {file.name for file in folder.iterdir()} == {file.name for file in before.iterdir()}
    assert same and all(f.read_bytes() == (before / f.name).read_bytes() for f in folder.glob("*.safetensors"))
    moe.experts.up[...] = moe.experts.up[...] + 1
    jax_moe.save_moe(moe, folder, 3)
    check_exact(held(jax_moe.load_moe(folder, 3)), held(moe), "put back")
    changed = {name for name, value in weights(folder).items() if not np.array_equal(value, weights(before)[name])}
    assert changed and all("layers.3.mlp.experts." in name and ("up" in name) for name in changed)
    assert weights(folder).keys() == weights(before).keys()
    assert (folder / "notes" / "readme.txt").read_text() == "kept as it is"
    assert {entry.name for entry in tmp_path.iterdir()} == {"one", "two"}


def test_what_cannot_be_put_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another contract, another dtype, a disk that fails: the folder stays as it was."""
    before = {file.name: file.read_bytes() for file in folder.glob("*.*")}
    other = jax_moe.MoE(jax_moe.presets.glm4_moe(8, 6, 6, 2, scale=2.5))
    with pytest.raises(ValueError, match=r"router\.num_clusters=1: must be 3; router\.top_clusters=1: must be 2"):
        jax_moe.save_moe(other, folder, 1)
    half = jax_moe.load_moe(folder, 1, dtype="bfloat16")
    with pytest.raises(PortError, match=r"experts\.0\.gate_proj\.weight is bfloat16, must be float32"):
        jax_moe.save_moe(half, folder, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, pytest.raises(ValueError, match="No space left on device"):
        broken.setattr("jax_moe.porting.mixture.copy_with", full)
        jax_moe.save_moe(mixture(3), folder, 1)
    assert before == {file.name: file.read_bytes() for file in folder.glob("*.*")}
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    jax_moe.save_moe(half, folder, 1, cast=True)
    again = jax_moe.load_moe(folder, 1)
    assert again.experts.up.dtype == jnp.float32
    check_exact({"up": held(again)["experts.up"]}, {"up": held(half)["experts.up"].astype(np.float32)}, "cast")


def test_a_copy_shares_no_file(folder: Path, tmp_path: Path) -> None:
    """Putting a layer into a copy leaves the original alone."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    jax_moe.save_moe(mixture(3), copy, 1)
    check_exact(held(jax_moe.load_moe(folder, 1)), held(mixture(1)), "the original")
    check_exact(held(jax_moe.load_moe(copy, 1)), held(mixture(3)), "the copy")


def test_experts_split_over_a_mesh(folder: Path) -> None:
    """On one device the same arrays."""
    moe = jax_moe.load_moe(folder, 1, mesh=jax_moe.sharding.expert_mesh(1))
    check_exact(held(moe), held(mixture(1)), "on a mesh")
