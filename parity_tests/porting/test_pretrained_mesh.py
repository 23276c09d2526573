"""Weights read straight onto a mesh of four virtual devices, in a subprocess."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import jax_moe
from jax_moe import sharding
from jax_moe.config.parameters import Declared
from jax_moe.sharding import place
from parity_tests.porting.decoder_cases import decoder

ON_FOUR = """
import sys, jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
from pathlib import Path
import jax_moe
from jax_moe import sharding
from jax_moe.porting.formats.shards import open_weights
from moe_parity.relative import relative_error

folder, family = Path(sys.argv[1]), sys.argv[2]
def arrays(model):
    return {".".join(map(str, keys)): v[...] for keys, v in nnx.to_flat_state(nnx.state(model))}
def saved(model, name):
    jax_moe.save_pretrained(model, folder.with_name(name), max_shard_bytes=2000)
    one, two = open_weights(folder), open_weights(folder.with_name(name))
    assert one.keys() == two.keys()
    assert all(one[n].read().tobytes() == two[n].read().tobytes() for n in one)

plain = jax_moe.load_pretrained(folder)
one = arrays(plain)
assert all(len(value.devices()) == 1 for value in one.values())
split = jax_moe.load_pretrained(folder, mesh=sharding.expert_mesh(4))
experts = {name for name in one if name.startswith("moe.experts.")}
assert len(experts) == 3
for name, value in arrays(split).items():
    parts = [shard.data.nbytes for shard in value.addressable_shards]
    assert len(parts) == 4 and set(parts) == {value.nbytes // 4 if name in experts else value.nbytes}, name
    assert np.asarray(value).tobytes() == np.asarray(one[name]).tobytes(), name
with jax.set_mesh(sharding.expert_mesh(2, 2)):
    both = jax_moe.load_pretrained(folder)
assert {s.data.nbytes for s in arrays(both)["moe.experts.up"].addressable_shards} == {one["moe.experts.up"].nbytes // 4}
if family == "qwen2_moe":
    tokens = jnp.arange(12).reshape(2, 6) % 11
    ours, logits = (np.asarray(jax.jit(lambda m, t: m(t))(model, tokens)) for model in (split, plain))
    print(relative_error(ours, logits))
from jax_moe.optimizers import adamw_as_torch
from moe_cli.sizes import memory_on_mesh
declared = jax_moe.declared(both)
said = memory_on_mesh(declared, dict.fromkeys(declared, 4), {"data": 2, "expert": 2})
def held(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
params = nnx.to_pure_dict(nnx.state(both, nnx.Param))
assert held(params) == said["weights"], (held(params), said)
init, mesh = adamw_as_torch(1e-3).init, sharding.expert_mesh(2, 2)
parts = sharding.split_tree(mesh, jax.eval_shape(init, params), declared)
state = held(jax.jit(init, out_shardings=parts)(params)) + 2 * held(params)  # the gradients lie as the weights
assert abs(state / said["training"] - 1) < 0.001, (state, said)
saved(split, "split")
saved(both, "both")
data = arrays(jax_moe.load_pretrained(folder, mesh=sharding.data_mesh(4)))
for name, value in data.items():
    whole = "norm" in name or "router" in name or "bias" in name and not name.endswith("out_bias")
    assert {s.data.nbytes for s in value.addressable_shards} == {value.nbytes if whole else value.nbytes // 4}, name
odd = arrays(jax_moe.load_pretrained(folder, mesh=sharding.expert_mesh(3)))
assert all(value.is_fully_replicated and len(value.devices()) == 3 for value in odd.values())
"""
TOLERANCE = 1e-6  # relative; measured 0, as each expert is whole on a device; another order of sums gives 1e-7


@pytest.mark.parametrize("model_type", ["qwen2_moe", "granitemoe"])
def test_experts_over_four_devices(model_type: str, tmp_path: Path) -> None:
    """A quarter of the experts per device, the same logits and files; 3 devices cannot divide 4, so they replicate."""
    jax_moe.save_pretrained(decoder(model_type), tmp_path / "model", model_type=model_type, max_shard_bytes=4000)
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_FOUR, str(tmp_path / "model"), model_type],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = [float(line) for line in done.stdout.splitlines()]
    assert len(errors) == (model_type == "qwen2_moe") and max(errors, default=0) <= TOLERANCE, errors


def test_only_the_windows_of_the_devices_are_made() -> None:
    asked = []

    def part(window: tuple[slice, ...]) -> np.ndarray:
        asked.append(window)
        return np.arange(24, dtype=np.float32).reshape(2, 4, 3)[window]

    array = place.place(part, Declared((2, 4, 3), "L E D", "expert"), sharding.expert_mesh(1))
    assert asked == [(slice(0, 2), slice(0, 4), slice(0, 3))]
    np.testing.assert_array_equal(np.asarray(array), np.arange(24).reshape(2, 4, 3))


def test_fetch_takes_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """From host memory, from the shards of a mesh, and cut out on a device before the copy to the host."""
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    array = jax.numpy.asarray(values)
    for index in ((1, 2, slice(None)), (slice(None), 3, slice(None)), (slice(None),) * 3):
        np.testing.assert_array_equal(place.fetch(array, index), values[index])
        np.testing.assert_array_equal(place._gathered(array, index), values[index])
    monkeypatch.setattr(place, "_on_host", lambda array: False)
    np.testing.assert_array_equal(place.fetch(array, (1, slice(None), slice(None))), values[1])


def test_meshes_that_are_refused() -> None:
    count = len(jax.local_devices())
    with pytest.raises(ValueError, match=f"mesh='data=2,expert={count}': must be of at most {count} devices"):
        sharding.expert_mesh(count, 2)
    with pytest.raises(ValueError, match="data=0: must be at least 1"):
        sharding.expert_mesh(1, 0)
    with pytest.raises(ValueError, match="mesh='tokens': must be of the axes data, expert, sequence, tensor"):
        sharding.device_mesh({"tokens": 1})
    arrays = {"experts.up": Declared((6, 4, 4), "E D F", "expert"), "query": Declared((4, 6, 2), "D H A", "attention")}
    for sizes, says in (((1, 4, 1, 1), "mesh expert=4: must be a divisor of 6, the experts of the model"),
                        ((1, 1, 1, 4), "mesh tensor=4: must be a divisor of 6, the attention heads of the model")):
        with pytest.raises(ValueError, match=says):
            sharding.check_divides(AbstractMesh(sizes, sharding.AXES), arrays)
    assert sharding.mesh_in_use() is None


def test_a_dim_is_split_by_its_letter() -> None:
    """A dim is split at any position; routers and indivisible dims are whole; two dims on an axis are refused."""
    mesh, whole = AbstractMesh((2, 4, 2), ("data", "expert", "tensor")), PartitionSpec()
    for dims, shape, role, expected in (
        ("L E D F", (3, 8, 6, 5), "expert", PartitionSpec(None, "expert", "data", None)),
        ("E F", (8, 6), "expert", PartitionSpec("expert", "tensor")),
        ("D F E", (6, 5, 4), "expert", PartitionSpec("data", None, "expert")),
        ("D H A", (6, 4, 4), "attention", PartitionSpec("data", "tensor", None)),
        ("D J A", (6, 1, 4), "attention", PartitionSpec("data", None, None)),
        ("V D", (11, 6), "embedding", PartitionSpec(None, "data")),
        ("L 1 W F", (3, 4, 8, 7), "shared", whole),
        ("L D", (3, 8), "norm", whole),
        ("L D E", (3, 6, 8), "router", whole),
        ("E D F", (6, 5, 7), "expert", whole),
        (None, (8, 8), None, whole),
    ):
        assert sharding.weight_split(mesh, Declared(shape, dims, role)).spec == expected, dims  # type: ignore[arg-type]
    for size, axes in ((8, ("data", "expert")), (6, ("data",)), (3, None)):
        split = sharding.batch_split(mesh, size).spec
        assert split == (whole if axes is None else PartitionSpec(axes)), size
    mesh = AbstractMesh((2, 4), ("data", "sequence"))
    for shape, expected in (((2, 8), ("data", "sequence")), ((3, 8), (None, "sequence")), ((2, 9), ("data",))):
        assert sharding.batch_split(mesh, *shape).spec == PartitionSpec(*expected), shape
    mesh, tensor = AbstractMesh((2, 4, 2), ("data", "expert", "tensor")), Declared((8, 4, 4), "E D F", "expert")
    split = sharding.weight_split(mesh, tensor, {"E": "expert", "F": "data"})
    assert split.spec == PartitionSpec("expert", None, "data")
    refused = "dims='E D F': must have one dim at most on axis 'expert', which the rules give to E and F"
    with pytest.raises(ValueError, match=refused):
        sharding.weight_split(mesh, tensor, {"E": "expert", "F": "expert"})
