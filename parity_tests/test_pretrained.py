"""Hugging Face folders without Hugging Face: names on disk, round trips, and every kind of broken folder."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import Decoder, DecoderConfig, presets
from jax_moe.decoder_config import RopeConfig
from jax_moe.porting import PortError, pretrained
from jax_moe.porting.families.hf import FAMILIES, mixtral
from jax_moe.porting.files import read_safetensors, write_safetensors
from parity_tests.compare import check_exact

SIZES: dict[str, Any] = {"vocab_size": 11, "model_dim": 8, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
EVERY = {"sliding_window": 3, "sliding_layers": (0, 1, 2)}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"moe": presets.mixtral(8, 6, 4, 2), "rope": RopeConfig(theta=1e6), **EVERY},
    "qwen2_moe": {
        "moe": presets.qwen2_moe(8, 6, 4, 2, shared_dim=4), "qkv_bias": True, "dense_layers": (1,), "dense_dim": 5,
        "sliding_window": 3, "sliding_layers": (0, 2),
    },
    "qwen3_moe": {
        "moe": presets.qwen3_moe(8, 6, 4, 2), "qk_norm": "per_head", "dense_layers": (0, 2), "dense_dim": 5,
        "rope": RopeConfig(kind="yarn", factor=2.0, original_max_positions=8, mscale=0.7, mscale_all_dim=0.5),
    },
    "olmoe": {
        "moe": presets.olmoe(8, 6, 4, 2), "qk_norm": "full_width", "clip_qkv": 3.5, "balance_loss_weight": 0.02,
        "rope": RopeConfig(kind="llama3", factor=2.0, original_max_positions=8), "qkv_bias": True, "output_bias": True,
    },
    "granitemoe": {
        "moe": presets.granite_moe(8, 6, 4, 2), "attention_multiplier": 0.2, "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5, "logits_divisor": 3.0, "tied_embeddings": True, "rope": RopeConfig(kind="linear", factor=2.0),
    },
}


def decoder(model_type: str, dtype: Any = "float32", **changes: Any) -> Decoder:
    """A decoder of the family, every weight its own random number."""
    config = DecoderConfig(**(SIZES | CONFIGS[model_type] | changes))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype)))
    generator = np.random.default_rng(0)
    filled = [
        (keys, v.replace(jnp.asarray(generator.normal(size=v.shape), v.dtype))) for keys, v in nnx.to_flat_state(nnx.state(model))
    ]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of all files."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in read_safetensors(file).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Qwen2-MoE folder that nobody changes."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    jax_moe.save_pretrained(decoder("qwen2_moe"), folder, model_type="qwen2_moe", max_shard_bytes=4000)
    jax_moe.load_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


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
    assert index["weight_map"].keys() == one.keys() and index["metadata"]["total_size"] == sum(v.nbytes for v in one.values())


def test_names_and_orientation() -> None:
    """Written out, not through the tables: layer 2, expert 3; the second mixture stands in layer 2, the dense layer is 1."""
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
    values = FAMILIES["mixtral"].values(DecoderConfig(**(SIZES | CONFIGS["mixtral"])))
    del values["rope_parameters"]
    old = values | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8}}
    assert FAMILIES["mixtral"].config(old).rope == RopeConfig(kind="linear", theta=5e5, factor=8.0, max_positions=2048)
    assert FAMILIES["mixtral"].config(values).rope.theta == 1e6


def test_a_new_family_is_a_reader_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made up: Mixtral under other names, its logits divided."""

    def write(config: DecoderConfig) -> dict[str, Any]:
        return mixtral.write(config) | {"coolness": config.logits_divisor}

    rows = tuple(replace(row, theirs=row.theirs.replace("w1", "up_hill")) for row in mixtral.MIXTRAL.tables[0].rows)
    table = replace(mixtral.MIXTRAL.tables[0], name="made_up", rows=rows)
    family = replace(
        mixtral.MIXTRAL, model_type="made_up", write=write, tables=(table,),
        read=lambda settings: replace(mixtral.read(settings), logits_divisor=settings.number("coolness", 1.0)),
    )
    monkeypatch.setitem(FAMILIES, "made_up", family)
    model = decoder("mixtral", logits_divisor=4.0)
    jax_moe.save_pretrained(model, tmp_path / "cool", model_type="made_up")
    assert "model.layers.0.block_sparse_moe.experts.0.up_hill.weight" in weights(tmp_path / "cool")
    loaded = jax_moe.load_pretrained(tmp_path / "cool")
    tokens = jnp.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(np.asarray(loaded(tokens)), np.asarray(model(tokens)))


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes config.json; None removes."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_shard(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors of one shard (and not the index)."""
    file = shard(folder)
    state = read_safetensors(file)
    edit(state)
    write_safetensors(file, state)


def shard(folder: Path) -> Path:
    """The second of several."""
    return sorted(folder.glob("model-*.safetensors"))[1]


def lie(folder: Path) -> None:
    """A header that says more bytes than the file has."""
    raw = shard(folder).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    last = max((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][1])
    last["data_offsets"][1] += 4000
    text = json.dumps(header).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def reindex(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    """Changes the index."""
    file = folder / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    edit(values["weight_map"])
    file.write_text(json.dumps(values))


def spoil(state: dict[str, np.ndarray]) -> None:
    """One NaN."""
    next(iter(state.values())).flat[1] = np.nan


def misshape(state: dict[str, np.ndarray]) -> None:
    """One row too many."""
    name = next(iter(state))
    state[name] = np.zeros((99, *state[name].shape[1:]), np.float32)


def narrow(state: dict[str, np.ndarray]) -> None:
    """Integers."""
    state |= {name: value.astype(np.int8) for name, value in state.items()}


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json: must be JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"must hold an object"),
    "unknown family": (lambda f: edit_config(f, model_type="llama"), r"model_type='llama': must be one of mixtral, qwen2_moe"),
    "no family": (lambda f: edit_config(f, model_type=None), r"model_type=None: must be one of"),
    "two faults": (
        lambda f: edit_config(f, hidden_size=None, num_hidden_layers="2"),
        r"num_hidden_layers='2': must be an integer.*hidden_size is missing|hidden_size is missing.*num_hidden_layers='2'",
    ),
    "heads": (lambda f: edit_config(f, num_key_value_heads=3), r"num_kv_heads=3: must be a divisor of num_heads=4"),
    "top k": (lambda f: edit_config(f, num_experts_per_tok=9), r"num_experts_per_tok=9: must be at most the number of exp"),
    "activation": (lambda f: edit_config(f, hidden_act="mish"), r"hidden_act='mish': must be one of silu"),
    "rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "spiral"}), r"rope_type='spiral': must be one of default"),
    "no factor": (lambda f: edit_config(f, rope_parameters={"rope_type": "linear"}), r"rope_parameters.factor is missing"),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), r"quantised weights are not supported"),
    "window": (lambda f: edit_config(f, use_sliding_window=False), r"use_sliding_window must be true"),
    "too few layers": (lambda f: edit_config(f, num_hidden_layers=2, layer_types=None), r"unexpected: .*layers\.2\."),
    "too many layers": (lambda f: edit_config(f, num_hidden_layers=4, layer_types=None), r"missing: .*layers\.3\."),
    "layers without end": (
        lambda f: edit_config(f, num_hidden_layers=10**12, layer_types=None), r"config.json: num_hidden_layers=10{12}: must fit",
    ),
    "experts without end": (lambda f: edit_config(f, num_experts=10**12), r"num_layers \* num_experts=20{12}: must fit the weig"),
    "another width": (lambda f: edit_config(f, moe_intermediate_size=7), r"misshapen: .*is \(6, 8\), must be \(7, 8\)"),
    "another shape": (lambda f: edit_shard(f, misshape), r"1 misshapen: .*is \(99"),
    "missing shard": (lambda f: shard(f).unlink(), r"model-00002-of-\d+.safetensors is missing"),
    "cut short": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-5]), r"model-00002.*is not one or is cut short"),
    "empty shard": (lambda f: shard(f).write_bytes(b""), r"model-00002.*is not one or is cut short"),
    "lying header": (lie, r"model-00002.*is not one or is cut short"),
    "extra tensor": (lambda f: edit_shard(f, lambda s: s.update(more=np.ones(2, np.float32))), r"holds more, which the index"),
    "lost tensor": (lambda f: edit_shard(f, lambda s: s.pop(next(iter(s)))), r"lacks lm_head.weight, which the index says"),
    "integers": (lambda f: edit_shard(f, narrow), r"tensors must be one of F64, F32, F16, BF16: lm_head.weight is I8"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), r"must hold model.safetensors or"),
    "index elsewhere": (lambda f: reindex(f, lambda m: m.update({next(iter(m)): "../x.safetensors"})), r"a file in this folder"),
    "index of nothing": (lambda f: reindex(f, lambda m: m.clear()), r"weight_map must say"),
    "NaN": (lambda f: edit_shard(f, spoil), r"1 wrong: lm_head.weight holds NaN or infinity"),
}


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
        (lambda: jax_moe.save_pretrained(model, folder), "exists already"),
        (lambda: jax_moe.save_pretrained(model, tmp_path / "no" / "where"), "is not a folder"),
        (lambda: jax_moe.save_pretrained(decoder("mixtral"), tmp_path / "x"), "model_type=None: must be one of mixtral"),
        (lambda: jax_moe.save_pretrained(decoder("qwen3_moe"), tmp_path / "x", model_type="mixtral"), "say .*dense_layers"),
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
    with pytest.raises(PortError, match=r"1 unexpected: lm_head\.weight"):
        jax_moe.load_pretrained(tmp_path / "tied")
