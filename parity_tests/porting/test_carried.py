"""Tensors that predict further tokens, and those around a text model: not used, and the same bits after every way
through files. No torch.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import Decoder, DecoderConfig, presets
from jax_moe.porting import PortError
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from parity_tests.cli.commands import fails, run
from parity_tests.porting.decoder_cases import weights
from parity_tests.shared.compare import MismatchError, check_exact
from parity_tests.shared.filled import filled

GLM = DecoderConfig.grouped(
    vocab_size=11, model_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    moe=presets.glm4_moe(8, 6, 4, 2), balance_loss_weight=0.0,
)
LAYER = "model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """GLM-4.5 with one more layer on disk, as it is published."""
    made = filled(lambda: Decoder(GLM, rngs=nnx.Rngs(0)))
    jax_moe.save_pretrained(made, tmp_path / "glm", model_type="glm4_moe")
    add(tmp_path / "glm", LAYER)
    say(tmp_path / "glm", num_nextn_predict_layers=1)
    return tmp_path / "glm"


def add(folder: Path, names: tuple[str, ...]) -> None:
    """Further tensors, each with its own numbers and in another dtype than the rest."""
    file = folder / "model.safetensors"
    more = {name: np.full((2, 3), i + 1.5, "float16") for i, name in enumerate(names)}
    write_safetensors(file, {**read_safetensors(file), **more})


def say(folder: Path, **settings: int) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_every_way_keeps_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded and saved, ported to a folder, to Orbax and back, in another dtype; the model is the one without them."""
    before = read_safetensors(folder / "model.safetensors")
    assert "carried: 2 tensors that predict further tokens; not used here, kept on saving" in run(
        capsys, "inspect", folder
    )
    loaded = jax_moe.load_pretrained(folder)
    assert loaded.config == GLM
    jax_moe.save_pretrained(loaded, tmp_path / "saved")
    run(capsys, "port", folder, tmp_path / "ported", "--to", "hf")
    run(capsys, "port", folder, tmp_path / "orbax")
    run(capsys, "port", tmp_path / "orbax", tmp_path / "back")
    jax_moe.save(jax_moe.load(tmp_path / "orbax"), tmp_path / "orbax2")
    shutil.rmtree(tmp_path / "orbax")
    run(capsys, "port", tmp_path / "orbax2", tmp_path / "again", "--to", "hf")
    for name in ("saved", "ported", "back", "again"):
        check_exact(weights(tmp_path / name), before, name)
    run(capsys, "port", folder, tmp_path / "half", "--to", "hf", "--dtype", "bfloat16")
    half = weights(tmp_path / "half")
    check_exact({name: half[name] for name in LAYER}, {name: before[name] for name in LAYER}, "another dtype")
    with pytest.raises(MismatchError):
        check_exact({LAYER[0]: half[LAYER[1]]}, {LAYER[0]: before[LAYER[0]]}, "exchanged")


def test_what_config_does_not_announce_is_refused(folder: Path) -> None:
    """A folder with more layers than config.json says is no decoder of fewer."""
    say(folder, num_nextn_predict_layers=0)
    with pytest.raises(PortError, match=r"2 unexpected: model\.layers\.2\.eh_proj\.weight"):
        jax_moe.load_pretrained(folder)


def test_a_source_that_is_gone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saving says what is missing and writes nothing."""
    loaded = jax_moe.load_pretrained(folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"glm: must still hold model\.layers\.2\.eh_proj\.weight, .* load the model"):
        jax_moe.save_pretrained(loaded, tmp_path / "saved")
    run(capsys, "port", tmp_path / "elsewhere", tmp_path / "orbax")
    (tmp_path / "orbax/carried.safetensors").unlink()
    assert "must still hold model.layers.2.eh_proj.weight" in fails(capsys, "port", tmp_path / "orbax", tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "orbax"}


@pytest.mark.parametrize(("family", "name"), [
    ("exaone_moe", "mtp.layers.0.q.weight"), ("qwen3_next", "mtp.fc.weight"),
    ("ernie4_5_moe", "model.mtp_emb_norm.0.weight"),
])
def test_families_with_names_of_their_own(family: str, name: str, tmp_path: Path) -> None:
    values = {
        "model_type": family, "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "moe_intermediate_size": 6, "intermediate_size": 5,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_k": 2, "sliding_window": 3,
        "shared_expert_intermediate_size": 4, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "linear_key_head_dim": 3, "linear_value_head_dim": 5, "full_attention_interval": 2,
        **({"partial_rotary_factor": 0.5} if family == "qwen3_next" else {}),
    }
    config = jax_moe.porting.families.FAMILIES[family].config(values)
    made = filled(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    jax_moe.save_pretrained(made, tmp_path / "one", model_type=family)
    add(tmp_path / "one", (name,))
    loaded = jax_moe.load_pretrained(tmp_path / "one")
    jax_moe.save_pretrained(loaded, tmp_path / "two")
    before = read_safetensors(tmp_path / "one/model.safetensors")
    check_exact(read_safetensors(tmp_path / "two/model.safetensors"), before, family)
    assert name in before


LLAMA4 = {
    "model_type": "llama4_text", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 6, "intermediate_size_mlp": 5, "moe_layers": [1],
    "num_local_experts": 4, "num_experts_per_tok": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 3,
}
AROUND = "vision_model.layernorm_pre.weight", "multi_modal_projector.linear_1.weight"


def test_a_model_around_the_text_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 4 as it is published: the text model in text_config and below language_model, a vision model beside it.

    Loaded it is the text model's decoder; saved, ported and trained further it is the whole folder again.
    """
    config = jax_moe.porting.families.FAMILIES["llama4"].config(LLAMA4)
    made = filled(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    jax_moe.save_pretrained(made, tmp_path / "text", model_type="llama4")
    values = json.loads((tmp_path / "text/config.json").read_text())
    assert values["model_type"] == "llama4_text" and jax_moe.load_pretrained(tmp_path / "text").config == config
    (tmp_path / "whole").mkdir()
    whole = {"model_type": "llama4", "text_config": values, "architectures": ["Llama4ForConditionalGeneration"]}
    (tmp_path / "whole/config.json").write_text(json.dumps(whole))
    inside = read_safetensors(tmp_path / "text/model.safetensors")
    write_safetensors(
        tmp_path / "whole/model.safetensors", {f"language_model.{name}": value for name, value in inside.items()}
    )
    add(tmp_path / "whole", AROUND)
    before = read_safetensors(tmp_path / "whole/model.safetensors")
    said = "carried: 2 tensors of the models around the text model; not used here, kept on saving"
    assert said in run(capsys, "inspect", tmp_path / "whole")
    loaded = jax_moe.load_pretrained(tmp_path / "whole")
    assert loaded.config == config
    tokens = jnp.arange(11)[None]
    np.testing.assert_array_equal(np.asarray(loaded(tokens)), np.asarray(made(tokens)))
    jax_moe.save_pretrained(loaded, tmp_path / "saved")
    run(capsys, "port", tmp_path / "whole", tmp_path / "orbax")
    run(capsys, "port", tmp_path / "orbax", tmp_path / "back", "--to", "hf")
    for name in ("saved", "back"):
        check_exact(weights(tmp_path / name), before, name)
        assert json.loads((tmp_path / name / "config.json").read_text()) == whole
    loaded.head[...] += 1
    jax_moe.save_pretrained(loaded, tmp_path / "trained")
    changed = weights(tmp_path / "trained")
    assert {name for name in before if (changed[name] != before[name]).any()} == {"language_model.lm_head.weight"}
