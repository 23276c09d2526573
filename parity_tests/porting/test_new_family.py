"""README's made-up family, run from README itself: one file and the list give it every command and every call."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.porting.families import FAMILIES
from jax_moe.porting.families.family import Family
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.formats.safetensors import read_safetensors
from jax_moe.porting.state_dict import their_shapes, tree_plan
from parity_tests.cli.commands import fails, names, run, same_folders
from parity_tests.shared.compare import MismatchError, check_exact
from parity_tests.shared.filled import filled
from parity_tests.shared.quick import QUICK

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- a new family: begin -->\n```python\n", "```\n<!-- a new family: end -->"
TOKENS = jnp.arange(6).reshape(2, 3)
CONFIG = jax_moe.DecoderConfig.grouped(
    vocab_size=11, model_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, logits_divisor=4.0,
    moe=presets.mixtral(8, 6, 4, 2),
)


def code() -> str:
    """What README shows."""
    return README.read_text().split(BEGIN, 1)[1].split(END, 1)[0]


@pytest.fixture
def cool(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The family, in the list. One with another attention kind would stand here beside it: its rows are in `Whole.attention`."""
    made: dict[str, Any] = {}
    exec(code(), made)
    monkeypatch.setitem(FAMILIES, "cool_moe", made["COOL"])
    return made["COOL"]


@pytest.fixture
def folder(cool: Family, tmp_path: Path) -> Path:
    """A model of the family, saved."""
    jax_moe.save_pretrained(model(), tmp_path / "cool", model_type=cool.name)
    return tmp_path / "cool"


def model() -> jax_moe.Decoder:
    """A decoder of the family's contract."""
    return filled(lambda: jax_moe.Decoder(CONFIG, rngs=nnx.Rngs(0)))


@partial(jax.jit, compiler_options=QUICK)
def run_decoder(decoder: jax_moe.Decoder) -> jax.Array:
    return decoder(TOKENS)


def logits(decoder: jax_moe.Decoder) -> dict[str, np.ndarray]:
    return {"logits": np.asarray(run_decoder(decoder))}


def test_readme_adds_a_family_in_twenty_lines(folder: Path) -> None:
    assert len([line for line in code().splitlines() if line.strip()]) <= 20
    made, weights = model(), read_safetensors(folder / "model.safetensors")
    for theirs, ours in (("gate", made.moe.experts.gate), ("down", made.moe.experts.down)):
        expected = np.asarray(ours[...])[1, 3].T
        check_exact({"w": weights[f"model.layers.1.mlp.expert.3.{theirs}.weight"]}, {"w": expected}, theirs)
    loaded = jax_moe.load_pretrained(folder)
    check_exact(logits(loaded), logits(made), "loaded")
    loaded.moe.experts.gate[...], loaded.moe.experts.up[...] = loaded.moe.experts.up[...], loaded.moe.experts.gate[...]
    with pytest.raises(MismatchError):
        check_exact(logits(loaded), logits(made), "gate and up exchanged")


def test_every_command_and_call_knows_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect, port both ways, load and save: bit for bit."""
    assert "cool_moe, " in run(capsys, "inspect", folder)
    assert "cool_moe, " in run(capsys, "port", folder, tmp_path / "orbax")
    assert "cool_moe, " in run(capsys, "inspect", tmp_path / "orbax")
    run(capsys, "port", tmp_path / "orbax", tmp_path / "back")
    same_folders(folder, tmp_path / "back")
    for place in (folder, tmp_path / "orbax", tmp_path / "back"):
        loaded = jax_moe.load(place)
        assert loaded.config == CONFIG and loaded.origin.model_type == "cool_moe"
        check_exact(jax_moe.to_torch(loaded), jax_moe.to_torch(model(), layout="hf_cool_moe"), place.name)
    jax_moe.save(jax_moe.load(folder), tmp_path / "saved")
    same_folders(folder, tmp_path / "saved")
    assert names(tmp_path) == {"cool", "orbax", "back", "saved"}


def test_the_order_of_its_optimizer(cool: Family) -> None:
    """As modules are defined: the embedding, layer by layer attention, mixture and norms, then the last norm and the head."""
    made = tree_plan(model(), layout=cool.in_memory(CONFIG).name)
    order = cool.parameter_order(made)
    layer = [name.removeprefix("model.layers.1.") for name in order if name.startswith("model.layers.1.")]
    assert order[0] == "model.embed_tokens.weight" and order[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert layer[:5] == [*(f"self_attn.{one}_proj.weight" for one in "qkvo"), "mlp.router.weight"]
    assert layer[-2:] == ["input_layernorm.weight", "post_attention_layernorm.weight"] and len(order) == 3 + 2 * len(layer)


def test_a_family_known_by_its_mixture_alone(
    cool: Family, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its contract and its rows serve a layer by itself; of the whole decoder one line says that it is not known."""
    monkeypatch.setitem(FAMILIES, "cool_moe", Family("cool_moe", cool.mixture))
    assert cool.mixture is not None
    values = json.loads((folder / "config.json").read_text())
    contract = FAMILIES["cool_moe"].mixture_config(values)
    assert contract == CONFIG.moe and values.items() >= cool.mixture.write(contract).items()
    with pytest.raises(ValueError, match=r"^num_experts_per_tok=9: must be at most the number of experts, 4$"):
        cool.mixture_config(values | {"num_experts_per_tok": 9})
    layer, prefix = jax_moe.MoE(contract, rngs=nnx.Rngs(0)), cool.mixture.on_disk.within.format(l=1)
    weights = read_safetensors(folder / "model.safetensors")
    below = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    assert below.keys() == their_shapes(layer, "hf_cool_layer").keys()
    jax_moe.from_torch(layer, below)
    check_exact({"up": np.asarray(layer.experts.up[...])}, {"up": np.asarray(model().moe.experts.up[...])[1]}, "layer 1")
    assert "cool_moe: mixtures in layers 0, 1" in run(capsys, "inspect", folder)
    assert "of this type the mixture of a layer is known, not the whole decoder" in fails(capsys, "generate", folder)


def test_families_share_a_layout_only_where_their_rows_are_the_same() -> None:
    found: dict[str, set] = {}
    for family in FAMILIES.values():
        for side in () if family.mixture is None else (family.mixture.on_disk, family.mixture.in_memory):
            found.setdefault(side.layer, set()).add(frozenset(side.rows))
    assert {layer for layer, rows in found.items() if len(rows) > 1} == set() and len(found) > 7


def test_a_setting_that_only_the_mixture_has_is_judged_alone(cool: Family) -> None:
    assert cool.mixture is not None
    settings = Settings({"hidden_size": 8, "expert_size": 6, "num_experts": 4, "num_experts_per_tok": 2})
    assert cool.mixture.read(settings) == presets.mixtral(8, 6, 4, 2) and settings.errors == []
