"""Made-up families, each in one file and the list, have every command and every call: that of docs/huggingface.md, run
from the page itself, and one with an attention of its own.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

import jax_moe
from jax_moe import presets
from jax_moe.config.attention import GroupedAttentionConfig
from jax_moe.config.decoder import LayerConfig
from jax_moe.parameters import declared
from jax_moe.porting.families import FAMILIES
from jax_moe.porting.families.family import GROUPED as GROUPED_ROWS
from jax_moe.porting.families.family import Family
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.formats.safetensors import read_safetensors
from jax_moe.porting.state_dict import their_shapes, tree_plan
from jax_moe.sharding.rules import RULES, weight_split
from parity_tests.cli.commands import fails, names, run, same_folders
from parity_tests.shared.compare import MismatchError, check_exact
from parity_tests.shared.filled import filled
from parity_tests.shared.mean_family import MEAN_ROWS, MeanConfig, add
from parity_tests.shared.quick import QUICK

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
BEGIN, END = "<!-- a new family: begin -->\n```python\n", "```\n<!-- a new family: end -->"
MEAN = MeanConfig(model_dim=8, width=6, scale=0.5)
GROUPED = GroupedAttentionConfig(model_dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
MESH = AbstractMesh((2,), ("expert",))
TOKENS = jnp.arange(6).reshape(2, 3)
CONFIG = jax_moe.DecoderConfig.grouped(
    vocab_size=11, model_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, logits_divisor=4.0,
    moe=presets.mixtral(8, 6, 4, 2),
)


def code() -> str:
    """What docs/huggingface.md shows."""
    return PAGE.read_text().split(BEGIN, 1)[1].split(END, 1)[0]


@pytest.fixture
def cool(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The page's family, in the list."""
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
def run_decoder(decoder: jax_moe.Decoder, tokens_BT: jax.Array) -> jax.Array:
    return decoder(tokens_BT)


def logits(decoder: jax_moe.Decoder) -> dict[str, np.ndarray]:
    return {"logits": np.asarray(run_decoder(decoder, TOKENS))}


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


@pytest.fixture(params=["cool_moe", "mean_moe", "mean_moe alone"])
def known(
    request: pytest.FixtureRequest, cool: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> jax_moe.Decoder:
    """A model of each family, saved as `one`; of the one with its own attention also without any other, and with other
    norms.
    """
    kinds = {"cool_moe": (), "mean_moe": (MEAN, GROUPED, MEAN), "mean_moe alone": (MEAN, MEAN)}[request.param]
    layers = tuple(LayerConfig(attention=one, ffn=CONFIG.moe) for one in kinds) or CONFIG.layers
    config, family = dataclasses.replace(CONFIG, layers=layers), cool
    if kinds:
        config, family = dataclasses.replace(config, logits_divisor=1.0), add(monkeypatch)
    if GROUPED not in kinds and kinds:
        config = dataclasses.replace(config, norm="layer", norm_place="around")
    made = filled(lambda: jax_moe.Decoder(config, rngs=nnx.Rngs(0)))
    jax_moe.save_pretrained(made, tmp_path / "one", model_type=family.name)
    return jax_moe.load_pretrained(tmp_path / "one")


def test_every_command_and_call_knows_it(
    known: jax_moe.Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """inspect, port both ways, load and save: bit for bit."""
    assert known.origin is not None
    name, folder = known.origin.model_type, tmp_path / "one"
    told = run(capsys, "inspect", folder)
    assert told.startswith(f"{name}, ") and ("a gated mean of width 6" in told) == (name == "mean_moe")
    assert f"{name}, " in run(capsys, "port", folder, tmp_path / "orbax")
    assert f"{name}, " in run(capsys, "inspect", tmp_path / "orbax")
    run(capsys, "port", tmp_path / "orbax", tmp_path / "back")
    same_folders(folder, tmp_path / "back")
    for place in (folder, tmp_path / "orbax", tmp_path / "back"):
        loaded = jax_moe.load(place)
        assert loaded.config == known.config and loaded.origin.model_type == name
        check_exact(jax_moe.to_torch(loaded), jax_moe.to_torch(known), place.name)
    jax_moe.save(jax_moe.load(folder), tmp_path / "saved")
    same_folders(folder, tmp_path / "saved")
    assert names(tmp_path) == {"one", "orbax", "back", "saved"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("known", ["mean_moe"], indirect=True)
def test_it_generates_with_its_cache(known: jax_moe.Decoder) -> None:
    """Every new token is the likeliest by a call on all that stands before it."""
    made = jax_moe.generate(known, TOKENS, max_new_tokens=4, temperature=0)
    likeliest = np.asarray(run_decoder(known, made[:, :-1])).argmax(-1)
    check_exact({"tokens": np.asarray(made)[:, 3:]}, {"tokens": likeliest[:, 2:].astype(np.int32)}, "generated")


def test_rows_of_its_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two of our arrays in one tensor; exchanged in the table they change the answer."""
    family = add(monkeypatch)
    layers = tuple(LayerConfig(attention=one, ffn=CONFIG.moe) for one in (MEAN, GROUPED, MEAN))
    config = dataclasses.replace(CONFIG, layers=layers, logits_divisor=1.0)
    made = filled(lambda: jax_moe.Decoder(config, rngs=nnx.Rngs(0)))
    jax_moe.save_pretrained(made, tmp_path / "one", model_type=family.name)
    stored = read_safetensors(tmp_path / "one/model.safetensors")["model.layers.2.mean_attn.in_proj.weight"]
    halves = [np.asarray(getattr(made.blocks_mean.attention, name)[...])[1].T for name in ("value", "gate")]
    check_exact({"w": stored}, {"w": np.concatenate(halves)}, "value and gate")
    check_exact(logits(jax_moe.load_pretrained(tmp_path / "one")), logits(made), "loaded")
    order = family.parameter_order(tree_plan(made, layout=family.in_memory(made.config).name))
    assert order[1:3] == ["model.layers.0.mean_attn.in_proj.weight", "model.layers.0.mean_attn.out_proj.weight"]
    split = {path: weight_split(MESH, one, RULES | {"A": "expert"}).spec for path, one in declared(made).items()}
    assert split["blocks_mean.attention.out"] == PartitionSpec(None, "expert", None), "by the dims that it says"
    assert split["moe.experts.up"] == PartitionSpec(None, "expert", None, None)
    file = tmp_path / "one/config.json"
    file.write_text(file.read_text().replace('"mean_width": 6', '"mean_width": 1000000'))
    with pytest.raises(ValueError, match=r"config.json: mean_width=1000000: must fit the weights"):
        jax_moe.load_pretrained(tmp_path / "one")
    file.write_text(file.read_text().replace('"mean_width": 1000000', '"mean_width": 6'))
    value, gate, out = MEAN_ROWS
    swapped = (dataclasses.replace(value, ours=gate.ours), dataclasses.replace(gate, ours=value.ours), out)
    wrong = dataclasses.replace(family.whole, attention={"grouped": GROUPED_ROWS, "mean": swapped})
    monkeypatch.setitem(FAMILIES, family.name, dataclasses.replace(family, decoder=wrong))
    with pytest.raises(MismatchError):
        check_exact(logits(jax_moe.load_pretrained(tmp_path / "one")), logits(made), "value and gate exchanged")


def test_the_order_of_its_optimizer(cool: Family) -> None:
    """The order of definition: the embedding; per layer attention, mixture and norms; the last norm and the head."""
    made = tree_plan(model(), layout=cool.in_memory(CONFIG).name)
    order = cool.parameter_order(made)
    layer = [name.removeprefix("model.layers.1.") for name in order if name.startswith("model.layers.1.")]
    assert order[0] == "model.embed_tokens.weight" and order[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert layer[:5] == [*(f"self_attn.{one}_proj.weight" for one in "qkvo"), "mlp.router.weight"]
    assert (
        layer[-2:] == ["input_layernorm.weight", "post_attention_layernorm.weight"] and len(order) == 3 + 2 * len(layer)
    )


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
    check_exact(
        {"up": np.asarray(layer.experts.up[...])}, {"up": np.asarray(model().moe.experts.up[...])[1]}, "layer 1"
    )
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
