"""A variable's class says whether it is stored and keeps fp32: a correction bias survives every kind of storage."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.config.precision import Precision
from jax_moe.porting.checkpoint import Checkpoint, load, save
from jax_moe.porting.convert import port_decoder
from jax_moe.porting.families import FAMILIES
from jax_moe.porting.families.family import (
    Family,
    Mixture,
    Names,
    Whole,
    read_decoder,
    read_moe,
    write_decoder,
    write_moe,
)
from jax_moe.porting.formats.open import open_path
from jax_moe.porting.formats.safetensors import read_safetensors
from jax_moe.porting.table.rows import Row
from jax_moe.precision import cast_to_compute
from jax_moe.stored import Kept, kept_paths, stored_state, stored_variables
from parity_tests.shared.compare import MismatchError, check_exact
from parity_tests.shared.filled import filled

BIAS, BF16 = "moe.router.correction_bias", np.dtype(jnp.bfloat16)
THEIRS = "model.layers.{}.mlp.gate.e_score_correction_bias"
ROWS = (
    Row("gate.weight", "E D", "router.kernel", "D E"),
    Row("gate.e_score_correction_bias", "E", "router.correction_bias", "E"),
    Row("experts.{e}.gate.weight", "F D", "experts.gate", "e D F"),
    Row("experts.{e}.up.weight", "F D", "experts.up", "e D F"),
    Row("experts.{e}.down.weight", "D F", "experts.down", "e F D"),
)


def with_bias(*sizes: int) -> jax_moe.MoEConfig:
    """A mixture whose choices a correction bias moves."""
    config = presets.mixtral(*sizes)
    return replace(config, router=replace(config.router, score="sigmoid", correction_bias=True))


NAMES = Names(ROWS, "hf_corrected_layer", "hf_corrected_moe")
CORRECTED = Family(
    "corrected_moe",
    Mixture(
        lambda settings: read_moe(with_bias, settings, "moe_size"),
        lambda moe: write_moe(moe, "num_experts", "moe_size"),
        NAMES, NAMES,
    ),
    Whole("CorrectedMoeForCausalLM", read_decoder, lambda config: write_decoder(config)),
)
CONFIG = jax_moe.DecoderConfig.grouped(
    vocab_size=11, model_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, moe=with_bias(8, 6, 4, 2),
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> jax_moe.Decoder:
    """A decoder in fp32 whose correction bias bf16 cannot hold."""
    monkeypatch.setitem(FAMILIES, "corrected_moe", CORRECTED)
    return filled(lambda: jax_moe.Decoder(CONFIG, rngs=nnx.Rngs(0)))


def check_bias(found: nnx.Module, model: jax_moe.Decoder) -> None:
    """Bit for bit in fp32, all else bf16."""
    variables = stored_variables(found)
    check_exact(
        {"bias": np.asarray(variables[BIAS][...])}, {"bias": np.asarray(stored_variables(model)[BIAS][...])}, "bias"
    )
    assert {path for path, v in variables.items() if v.dtype != BF16} == {BIAS}


def test_a_correction_bias_is_written_and_read_as_bf16_bit_for_bit(model: jax_moe.Decoder, tmp_path: Path) -> None:
    jax_moe.save_pretrained(model, tmp_path / "hf", model_type="corrected_moe")
    weights, bias = (
        read_safetensors(tmp_path / "hf" / "model.safetensors"),
        np.asarray(stored_variables(model)[BIAS][...]),
    )
    check_exact({"w": weights[THEIRS.format(1)]}, {"w": bias[1]}, "in the file")
    assert not np.array_equal(bias.astype(BF16).astype(np.float32), bias), "bf16 must not hold it, or nothing is tested"
    loaded = jax_moe.load_pretrained(tmp_path / "hf", dtype="bfloat16")
    check_bias(loaded, model)
    again = tmp_path / "again"
    jax_moe.save_pretrained(loaded, again)
    check_bias(jax_moe.load_pretrained(again), model)
    loaded.moe.router.correction_bias[...] = bias.astype(BF16).astype(np.float32)
    with pytest.raises(MismatchError):
        check_bias(loaded, model)


def test_ports_between_both_forms_keep_it(model: jax_moe.Decoder, tmp_path: Path) -> None:
    jax_moe.save_pretrained(model, tmp_path / "hf", model_type="corrected_moe")
    for source, target, to in (("hf", "orbax", "orbax"), ("hf", "narrow", "hf"), ("orbax", "back", "hf")):
        port_decoder(
            open_path(tmp_path / source), tmp_path / target, to, dtype=BF16,  # type: ignore[arg-type]
            max_shard_bytes=10**9, overwrite=False, allow_nonfinite=False,
            progress=lambda what, total: nullcontext(lambda size: None), say=lambda _: None,
        )
        check_bias(load(tmp_path / target).module, model)


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_own_folders_of_a_layer_keep_it(storage: str, tmp_path: Path) -> None:
    layer = filled(lambda: jax_moe.MoE(with_bias(8, 6, 4, 2), rngs=nnx.Rngs(0)))
    save(Checkpoint("moe", layer), tmp_path / "own", storage=storage)  # type: ignore[arg-type]
    loaded = load(tmp_path / "own", dtype="bfloat16").module
    variables, path = stored_variables(loaded), "router.correction_bias"
    check_exact(
        {"bias": np.asarray(variables[path][...])}, {"bias": np.asarray(layer.router.correction_bias[...])}, "bias"
    )
    assert {name for name, v in variables.items() if v.dtype != BF16} == {path}


class Odd(nnx.Module):
    """A module with a kept variable of neutral name, a generator, and a parameter named like a correction bias."""

    def __init__(self) -> None:
        self.shift = Kept(jnp.full((3,), 0.1))
        self.my_correction_bias = nnx.Param(jnp.full((3,), 0.1))
        self.rngs = nnx.Rngs(0)


def test_the_class_decides_and_not_the_name() -> None:
    module = Odd()
    assert set(stored_variables(module)) == {"shift", "my_correction_bias"}
    assert kept_paths(module) == {"shift"}
    cast = cast_to_compute(stored_state(module), Precision(compute="bfloat16"))
    assert {name: v.dtype for name, v in nnx.to_pure_dict(cast).items()} == {
        "shift": jnp.float32,
        "my_correction_bias": BF16,
    }
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cast))
