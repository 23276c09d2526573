"""The TPU kernels that jax ships, in Pallas' interpreter: products and gradients, and a layer that uses them."""

import dataclasses
import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import MoE, presets
from jax_moe.kernels import devices, megablox, ragged
from parity_tests.shared.compare import MismatchError, check_close
from parity_tests.shared.filled import filled
from parity_tests.shared.quick import QUICK

# Its package has a function of the same name.
shipped = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
COUNTS = {  # 150 rows, two tiles; the last four experts' sum is below it: rows that are nobody's
    "uneven": [70, 0, 79, 1], "one has all": [0, 150, 0, 0], "rows of nobody": [10, 3, 0, 90], "none": [0, 0, 0, 0],
}
Answers = dict[str, np.ndarray]


def answers(product: object, counts: list[int]) -> Answers:
    """The product and both gradients, where rows of nobody hold NaN."""
    R, D, F, E = 150, 40, 130, 4
    generator = np.random.default_rng(0)
    x, weight, probe = (
        jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((R, D), (E, D, F), (R, F))
    )
    x = jnp.where((jnp.arange(R) < sum(counts))[:, None], x, jnp.nan)

    def both(x: jax.Array, weight: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, weight: product(x, weight, count), x, weight)  # type: ignore[operator]
        return y, *pull(probe)

    found = jax.jit(both, compiler_options=QUICK)(x, weight, jnp.asarray(counts, jnp.int32))
    return dict(zip(("y", "x", "weight"), map(np.asarray, found), strict=True))


def by_expert(x: jax.Array, weight: jax.Array, count: jax.Array) -> jax.Array:
    """Each row times the weights of its expert."""
    end = jnp.cumsum(count)
    row = jnp.arange(x.shape[0])
    expert = jnp.searchsorted(end, row, side="right")
    inside = (row < end[-1])[:, None]
    return jnp.where(inside, jnp.einsum("RD,RDF->RF", jnp.where(inside, x, 0), weight[jnp.minimum(expert, 3)]), 0)


interpreted = partial(megablox.grouped_product, interpret=True)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows, and columns that they do not divide, are in several tiles."""
    monkeypatch.setattr(megablox, "ROWS", 128)
    monkeypatch.setattr(megablox, "WIDTH", 128)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", COUNTS)
def test_products_and_gradients(name: str) -> None:
    """Also with an expert that has no rows, and NaN in the rows after the last expert's."""
    check_close(answers(interpreted, COUNTS[name]), answers(by_expert, COUNTS[name]), 3e-6, name)  # measured 3.8e-7


@pytest.mark.usefixtures("small_tiles")
def test_rows_of_a_neighbour_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the weights' gradient takes a row less of one expert and a row more of the next."""
    real = shipped.tgmm

    def shifted(x: jax.Array, g: jax.Array, count: jax.Array, **options: object) -> jax.Array:
        return real(x, g, count + jnp.asarray([-1, 1, 0, 0]), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shipped, "tgmm", shifted)
    with pytest.raises(MismatchError, match="weight"):
        check_close(answers(interpreted, COUNTS["uneven"]), answers(by_expert, COUNTS["uneven"]), 1e-3, "shifted")


def layer(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> Answers:
    """A layer with padding, whose choices are rows of nobody: its loss and every gradient."""
    config = dataclasses.replace(presets.mixtral(6, 10, num_experts=4, top_k=2), dispatcher="ragged")
    graphdef, params = nnx.split(filled(lambda: MoE(config)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 6)), jnp.float32)
    mask = jnp.asarray([[True, True, False, True, False]])

    def loss(params: nnx.State, x: jax.Array) -> jax.Array:
        y = nnx.merge(graphdef, params)(x, mask_BT=mask)[0]
        return (y * jnp.arange(y.size).reshape(y.shape)).sum()

    with monkeypatch.context() as patch:
        if kernels:
            patch.setattr(devices, "megablox_serves", lambda *_: True)
            patch.setattr(ragged.megablox, "grouped_product", interpreted)
        value, (by_params, by_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=QUICK)(params, x)
    gradients = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(by_params)}
    return {"loss": np.asarray(value), "x": np.asarray(by_x), **gradients}


def test_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    check_close(layer(monkeypatch, True), layer(monkeypatch, False), 1e-6, "layer")  # measured 1.3e-7


def test_where_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one TPU, or on one device's part of a mesh; for bf16 and whole tiles."""
    assert not devices.megablox_serves(jnp.bfloat16, 256, 256)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert devices.megablox_serves(jnp.bfloat16, 128, 256)
    assert not devices.megablox_serves(jnp.float32, 128, 256) and not devices.megablox_serves(jnp.bfloat16, 64, 256)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert not devices.megablox_serves(jnp.bfloat16, 128, 256)
    inside: list[bool] = []
    for kinds in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Manual):
        mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(kinds,))
        with jax.sharding.use_abstract_mesh(mesh):
            inside.append(devices.megablox_serves(jnp.bfloat16, 128, 256))
    assert inside == [False, True]
