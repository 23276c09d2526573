"""Weights both ways on numpy dicts and safetensors; needs no torch. Long because it tests every module and layout."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_moe
from jax_moe import presets
from jax_moe.config.as_json import config_from_json, config_to_json
from jax_moe.config.choices import Choices
from jax_moe.config.parameters import Declared
from jax_moe.disk import verify
from jax_moe.parameters import declared
from jax_moe.porting import PortError, from_torch_tree
from jax_moe.porting.checkpoint import Checkpoint, load, save
from jax_moe.porting.families import tables_of
from jax_moe.porting.formats.safetensors import write_safetensors
from jax_moe.porting.formats.state_file import read_state, write_state
from jax_moe.porting.table.plan import check, make_plan, to_ours, to_theirs
from jax_moe.porting.table.rows import Row, Table
from parity_tests.porting.porting_cases import (
    MODULES,
    STATES,
    TINY,
    bits,
    make,
    makemoe_state,
    mixtral_state,
    soft_state,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODULES)
def test_round_trip_keeps_every_bit(name: str, dtype: str) -> None:
    source, target = make(name, 1, dtype), make(name, 2, dtype)
    assert bits(source) != bits(target)
    state = jax_moe.to_torch(source)
    assert all(value.flags.c_contiguous for value in state.values())
    assert jax_moe.from_torch(target, state) is target
    assert bits(source) == bits(target)
    verify(state, jax_moe.to_torch(target), Path(name))


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.startswith("moe_") and MODULES[name][1] != "torch_ref"]
)
def test_layouts_of_one_module_are_found_by_their_names(name: str) -> None:
    source, layout = make(name, 1), MODULES[name][1]
    theirs, ours = jax_moe.to_torch(source, layout=layout), jax_moe.to_torch(source)
    assert theirs.keys() != ours.keys()
    for state in (theirs, ours):
        assert bits(jax_moe.from_torch(make(name, 2), state)) == bits(source)
    with pytest.raises(PortError, match="layout torch_ref"):
        jax_moe.from_torch(make(name, 2), theirs, layout="torch_ref")


def test_original_names_and_numbers() -> None:
    state = makemoe_state()
    model = jax_moe.from_torch(make("makemoe"), state)
    back = jax_moe.to_torch(model)
    verify(state, back, Path("makemoe"))
    # checked by hand, not by the tables: layer 2, head 1, expert 3
    attention, moe = model.blocks.attention, model.blocks.moe
    assert (attention.key[...][2, :, 1] == state["blocks.2.sa.heads.1.key.weight"].T).all()
    assert (attention.value[...][2, :, 1] == state["blocks.2.sa.heads.1.value.weight"].T).all()
    assert (attention.out[...][2].reshape(8, 8) == state["blocks.2.sa.proj.weight"].T).all()
    assert (moe.router.kernel[...][2] == state["blocks.2.smoe.router.topkroute_linear.weight"].T).all()
    assert (moe.router.noise_bias[...][2] == state["blocks.2.smoe.router.noise_linear.bias"]).all()
    assert (moe.experts.up[...][2, 3] == state["blocks.2.smoe.experts.3.net.0.weight"].T).all()
    assert (moe.experts.down_bias[...][2, 3] == state["blocks.2.smoe.experts.3.net.2.bias"]).all()
    assert (model.blocks.moe_norm.scale[...][2] == state["blocks.2.ln2.weight"]).all()


def test_mixtral_and_soft_numbers() -> None:
    state = mixtral_state()
    layer = jax_moe.from_torch(make("moe_mixtral"), state)
    assert (layer.experts.gate[...][3] == state["experts.3.w1.weight"].T).all()
    assert (layer.experts.up[...][3] == state["experts.3.w3.weight"].T).all()
    assert (layer.experts.down[...][3] == state["experts.3.w2.weight"].T).all()
    verify(state, jax_moe.to_torch(layer, layout="mixtral"), Path("mixtral"))
    soft = soft_state()
    layer = jax_moe.from_torch(make("soft_moe"), soft)
    assert (layer.experts.fcs[1].kernel[...][2] == soft["experts.2.fcs.1.weight"].T).all()
    assert (layer.experts.last_ln.scale[...][2] == soft["experts.2.last_ln.weight"]).all()
    verify(soft, jax_moe.to_torch(layer), Path("soft"))


def test_fused_projection_rows_are_query_key_value_by_head() -> None:
    layer = make("attention_fused", 3)
    fused = jax_moe.to_torch(layer)["qkv.weight"].reshape(3, 2, 4, 8)  # P H A D
    assert (fused == np.asarray(layer.qkv[...]).transpose(1, 2, 3, 0)).all()


def test_everything_wrong_is_reported_together_and_nothing_is_loaded() -> None:
    state = makemoe_state()
    del state["ln_f.bias"], state["blocks.1.sa.heads.0.tril"]
    state["blocks.0.sa.extra"] = np.zeros(3, np.float32)
    state["lm_head.weight"] = state["lm_head.weight"].T.copy()
    state["blocks.2.smoe.experts.3.net.2.bias"] = state["blocks.2.smoe.experts.3.net.2.bias"].astype(np.float64)
    state["blocks.0.sa.heads.1.tril"] = np.ones((4, 4), np.float32)
    model = make("makemoe", 5)
    before = bits(model)
    with pytest.raises(PortError) as caught:
        jax_moe.from_torch(model, state)
    error = caught.value
    assert sorted(error.missing) == ["blocks.1.sa.heads.0.tril", "ln_f.bias"]
    assert error.unexpected == ["blocks.0.sa.extra"]
    assert error.misshapen == ["lm_head.weight is (8, 11), must be (11, 8)"]
    assert error.mistyped == ["blocks.2.smoe.experts.3.net.2.bias is float64, must be float32"]
    assert error.wrong == ["blocks.0.sa.heads.1.tril must be the lower triangular mask of ones"]
    named = [*error.missing, *error.unexpected, *error.misshapen, *error.mistyped, *error.wrong]
    assert all(name in str(error) for name in named) and "\n" not in str(error)
    assert bits(model) == before


def test_dtype_changes_only_when_asked() -> None:
    state = makemoe_state("float16")
    with pytest.raises(PortError, match="is float16, must be float32"):
        jax_moe.from_torch(make("makemoe"), state)
    model = jax_moe.from_torch(make("makemoe"), state, cast=True)
    assert (model.head.bias[...] == state["lm_head.bias"].astype(np.float32)).all()


def test_fp64_is_never_narrowed() -> None:
    with jax.enable_x64(True):
        model = make("makemoe", 1, "float64")
        state = jax_moe.to_torch(model)
    assert state["lm_head.weight"].dtype == np.float64
    with pytest.raises(PortError, match="jax_enable_x64"):
        jax_moe.from_torch(model, state)
    with pytest.raises(PortError, match="jax_enable_x64"):
        from_torch_tree(model, {name: value for name, value in state.items() if "tril" not in name})


def test_unknown_layout_and_module_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"layout='keras': must be one of 'torch_ref', 'mixtral', .*'hf_granitemoe'.* for MoE"
    ):
        jax_moe.from_torch(make("moe_mixtral"), {}, layout="keras")
    with pytest.raises(PortError, match=r"layout mixtral has no names for.*router\.bias"):
        jax_moe.to_torch(make("moe_makemoe"), layout="mixtral")
    with pytest.raises(ValueError, match="Linear has no porting table"):
        jax_moe.to_torch(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", MODULES)
def test_trees_take_the_same_names(name: str) -> None:
    module = make(name, 1)
    state = nnx.state(module, nnx.Param)
    pure = nnx.to_pure_dict(state)
    named = jax_moe.to_torch(module, state)
    verify(named, jax_moe.to_torch(module, pure), Path(name))
    weights = jax_moe.to_torch(module)
    assert weights.keys() - named.keys() == {key for key in weights if "tril" in key or "correction_bias" in key}
    verify(named, {key: weights[key] for key in named}, Path(name))
    tree = from_torch_tree(module, named)
    assert jax.tree.structure(tree) == jax.tree.structure(pure)
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(pure), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_moments_of_optax_take_the_same_names() -> None:
    module = make("moe_mixtral", 1)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    optimizer = optax.adamw(1e-3)
    _, moments = optimizer.update(params, optimizer.init(params), params)
    named = jax_moe.to_torch(module, optax.tree.get(moments, "mu"), layout="mixtral")
    weights = jax_moe.to_torch(module, layout="mixtral")
    assert named.keys() == weights.keys()
    for name, value in named.items():
        # measured 0; one fp32 rounding is 1.2e-7
        assert np.allclose(value, 0.1 * weights[name], rtol=1e-6, atol=0), name
    as_state = nnx.state(module, nnx.Param)  # optax over nnx.State, as jax.grad over it returns
    _, moments = optimizer.update(as_state, optimizer.init(as_state), as_state)
    verify(named, jax_moe.to_torch(module, moments[0].mu, layout="mixtral"), Path("mu"))


def test_a_tree_that_does_not_fit_is_refused() -> None:
    module = make("moe_mixtral")
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    tree["experts"]["up"] = tree["experts"]["up"][:, :, :5]
    tree["experts"]["other"] = tree["experts"].pop("down")
    with pytest.raises(PortError) as caught:
        jax_moe.to_torch(module, tree)
    assert caught.value.missing == ["experts.down"] and caught.value.unexpected == ["experts.other"]
    assert caught.value.misshapen == ["experts.up is (4, 8, 5), must be (4, 8, 6)"]


def test_engine_takes_fused_and_interleaved_parts() -> None:
    """Rows for files that fuse weights which we store separately, and the reverse."""
    rng = np.random.default_rng(0)
    E, D, F = 3, 4, 5
    ours = {
        "gate": rng.standard_normal((E, D, F)), "up": rng.standard_normal((E, D, F)),
        "qkv": rng.standard_normal((D, 3, F)),
    }
    table = Table("fused", (
        Row("gate_up", "E (F 0/2) D", "gate", "E D F"),  # interleaved
        Row("gate_up", "E (F 1/2) D", "up", "E D F"),
        *(Row(name, "F D", "qkv", f"D {i}/3 F") for i, name in enumerate(("q", "k", "v"))),
    ))
    plan = make_plan(table, {name: Declared(value.shape) for name, value in ours.items()})
    theirs = to_theirs(plan, ours)
    assert (theirs["gate_up"][:, 0::2] == ours["gate"].transpose(0, 2, 1)).all()
    assert (theirs["gate_up"][:, 1::2] == ours["up"].transpose(0, 2, 1)).all()
    assert (theirs["k"] == ours["qkv"][:, 1].T).all()
    check(plan, theirs, "fused")
    back = to_ours(plan, theirs)
    assert all((back[name] == ours[name]).all() for name in ours)


def test_engine_takes_stretches_of_unlike_lengths() -> None:
    """One tensor of theirs holds several of ours one after the other, as a whole or head by head."""
    rng = np.random.default_rng(0)
    D, J, A, O, C = 4, 2, 3, 5, 2  # noqa: E741
    ours = {name: rng.standard_normal((D, J, width)) for name, width in (("q", A), ("k", A), ("v", O))}
    ours |= {f"{name}_taps": rng.standard_normal((J, width, C)) for name, width in (("q", A), ("v", O))}
    named = (("q", "A"), ("k", "A"), ("v", "O"))
    table = Table("stretched", (
        *(Row("by_head", f"(J {i}|A+A+O) D", name, f"D J {width}") for i, (name, width) in enumerate(named)),
        Row("taps", "0|J*A+J*O 0/1 C", "q_taps", "J A C"), Row("taps", "1|J*A+J*O 0/1 C", "v_taps", "J O C"),
    ))
    plan = make_plan(table, {name: Declared(value.shape) for name, value in ours.items()})
    theirs = to_theirs(plan, ours)
    assert theirs["by_head"].shape == (J * (2 * A + O), D) and theirs["taps"].shape == (J * (A + O), 1, C)
    for j in range(J):
        start = j * (2 * A + O)
        np.testing.assert_array_equal(theirs["by_head"][start : start + A], ours["q"][:, j].T)
        np.testing.assert_array_equal(theirs["by_head"][start + 2 * A : start + 2 * A + O], ours["v"][:, j].T)
    np.testing.assert_array_equal(theirs["taps"][J * A :, 0], ours["v_taps"].reshape(J * O, C))
    check(plan, theirs, "stretched")
    back = to_ours(plan, theirs)
    assert all((back[name] == ours[name]).all() for name in ours)
    assert plan.held("by_head").all() and not plan.partial
    short = Table("short", (Row("taps", "0|J*A+J*O 0/1 C", "q_taps", "J A C"), *table.rows[4:]))
    assert make_plan(short, {name: Declared(ours[name].shape) for name in ("q_taps", "v_taps")}).partial == frozenset()


def test_a_table_that_covers_a_weight_in_part_is_refused() -> None:
    with pytest.raises(PortError, match="has no names for: 1 missing: qkv"):
        make_plan(Table("half", (Row("q", "F D", "qkv", "D 0/3 F"),)), {"qkv": Declared((4, 3, 5))})


def test_safetensors_of_transposed_views_holds_the_right_numbers(tmp_path: Path) -> None:
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert not view.flags.c_contiguous
    write_safetensors(tmp_path / "a.safetensors", {"a": view, "scalar": np.float32(3).reshape(())})
    back = read_state(tmp_path / "a.safetensors")
    assert (back["a"] == view).all() and back["scalar"].shape == ()
    from safetensors.numpy import save_file  # the fault that `write_safetensors` avoids

    save_file({"a": view}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="differs in a"):
        verify({"a": view}, read_state(tmp_path / "b.safetensors"), tmp_path / "b.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", STATES)
def test_files_and_folders_keep_every_bit(family: str, dtype: str, tmp_path: Path) -> None:
    state = STATES[family](dtype)
    write_state(tmp_path / "a.safetensors", state)
    checkpoint = load(tmp_path / "a.safetensors", Choices(top_k=1) if family == "mixtral" else None)
    assert checkpoint.family == family
    save(checkpoint, tmp_path / "folder")
    again = load(tmp_path / "folder")
    assert again.config == checkpoint.config and again.family == family
    verify(state, again.state(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "folder"]


def test_sizes_are_read_from_the_tensors(tmp_path: Path) -> None:
    write_state(tmp_path / "a.safetensors", makemoe_state())
    assert load(tmp_path / "a.safetensors", Choices(dropout=0.0)).config == TINY
    dropless = load(tmp_path / "a.safetensors", Choices(top_k=3, capacity_factor="none", dropout=0.0)).config
    assert dropless == dataclasses.replace(TINY, top_k=3, capacity_factor=None)
    quiet = {name: value for name, value in makemoe_state().items() if "noise_linear" not in name}
    write_state(tmp_path / "b.safetensors", quiet)
    assert load(tmp_path / "b.safetensors").config.noise is False
    layer = {
        name.removeprefix("blocks.0.smoe."): value
        for name, value in makemoe_state().items()
        if "blocks.0.smoe." in name
    }
    write_state(tmp_path / "c.safetensors", layer)
    checkpoint = load(tmp_path / "c.safetensors")
    assert (checkpoint.family, checkpoint.config) == ("makemoe_layer", presets.makemoe(8, 32, 4))
    verify(layer, checkpoint.state(), tmp_path)


@pytest.mark.parametrize("name", presets.__all__)
def test_contracts_survive_json(name: str) -> None:
    config = getattr(presets, name)()
    again = config_from_json(jax_moe.MoEConfig, json.loads(json.dumps(config_to_json(config))), "config")
    assert again == config


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_dims": 8}, "config: unknown model_dims"),
        ({"num_heads": "two"}, "config.num_heads='two': must be int"),
        ({"noise": 1}, "config.noise=1: must be bool"),
        ({"num_heads": 3}, "num_heads=3: must be a divisor of model_dim=8"),
        ({"top_k": 5}, "top_k=5: must be at most num_experts=4"),
    ],
)
def test_a_bad_contract_is_one_line(change: dict, line: str) -> None:
    with pytest.raises(ValueError) as caught:
        config_from_json(jax_moe.MakeMoEConfig, {**config_to_json(TINY), **change}, "config")
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_layer_on_several_devices_keeps_its_placement() -> None:
    """In a subprocess: the number of devices is fixed before jax starts."""
    code = """
import jax, numpy as np, jax_moe
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from parity_tests.porting.porting_cases import make, bits
mesh = Mesh(np.array(jax.devices()), ("expert",))
layer, source = make("moe_mixtral", 1), make("moe_mixtral", 2)
layer.experts.up[...] = jax.device_put(layer.experts.up[...], NamedSharding(mesh, PartitionSpec("expert")))
before = layer.experts.up[...].sharding
jax_moe.from_torch(layer, jax_moe.to_torch(source))
assert layer.experts.up[...].sharding == before and len(before.device_set) == 4
assert bits(layer) == bits(source)
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_checkpoint_names_its_weights() -> None:
    checkpoint = Checkpoint("mixtral", make("moe_mixtral"))
    assert sorted(checkpoint.weights) == ["experts.down", "experts.gate", "experts.up", "router.kernel"]
    assert checkpoint.weights["experts.up"].dtype == jnp.float32


@pytest.mark.parametrize("dims", ["e F D", "e D D", "D F"])
def test_a_row_with_other_dims_than_the_parameter_is_refused(dims: str) -> None:
    """Shapes alone would allow another order if two sizes are equal."""
    layer = jax_moe.MoE(presets.mixtral(6, 6, 3, 2))
    rows = tuple(
        dataclasses.replace(row, our_dims=dims) if row.ours == "experts.up" else row for row in tables_of(layer)[0].rows
    )
    wanted = f"layout wrong: dims of experts.up in the row of .*={dims!r}: must be 'E D F', as the parameter says"
    with pytest.raises(ValueError, match=wanted):
        make_plan(Table("wrong", rows), declared(layer))
