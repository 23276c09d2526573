"""Layers and models give the numbers of one device on any mesh: each in a process with eight virtual devices."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_moe
from jax_moe import presets, sharding
from jax_moe.config.moe import MoEConfig
from jax_moe.sharding import explicit
from jax_moe.sharding.expert_parallel import fewest_rows
from jax_moe.sharding.mesh import AXES
from parity_tests.sharding.on_meshes import CASES, named
from parity_tests.shared.compare import check_close
from parity_tests.shared.quick import LEVEL

ROOT = Path(__file__).parents[2]
# A process each, as its start takes seconds
GROUPS = {
    "layers": [name for name in CASES if name.startswith("layer, ")],
    "models": [name for name in CASES if not name.startswith("layer, ")],
}
# Of the answers, the gradients and the weights after ten steps: relative, in fp64
TOLERANCES = (1.2e-13, 2.9e-14, 5.4e-14)  # measured: 1.2e-14, 2.9e-15, 9.3e-15


def with_eight_devices(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A program of this folder with eight devices."""
    flags = " ".join(f"--{name}={value}" for name, value in LEVEL.items())
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-W", "error", "-m", f"parity_tests.sharding.{program}", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("group", GROUPS)
def test_the_numbers_of_one_device(group: str) -> None:
    """On every mesh and by every exchange of the cases; planted faults are found."""
    names = GROUPS[group]
    done = with_eight_devices("on_meshes", *names)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = iter(done.stdout.splitlines())
    for name in names:
        assert next(lines) == f"{name}:"
        for way in CASES[name].ways:
            said, *errors = next(lines).split()
            assert said == str(way), (name, said)
            assert all(float(error) <= limit for error, limit in zip(errors, TOLERANCES, strict=True)), (name, said)
        assert [next(lines) for _ in CASES[name].faults] == [f"found: {fault}" for fault, _, _ in CASES[name].faults]
    assert list(lines) == []


def explicit_mesh() -> jax.sharding.Mesh:
    """Of one device."""
    return jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=jax.devices()[:1])


def soft_moe() -> jax_moe.SoftMoE:
    """A layer of soft slots."""
    return jax_moe.SoftMoE(jax_moe.SoftMoEConfig(model_dim=8, num_experts=4, num_slots=2, hidden_dims=(6,)))


DRAW = np.random.default_rng(0)
VECTORS, TOKENS = DRAW.normal(size=(2, 5, 8)).astype("float32"), DRAW.integers(0, 11, (2, 5)).astype("int32")
CALLS: dict[str, tuple[Callable[[], Any], str, np.ndarray]] = {
    "SoftMoE": (lambda: soft_moe().run, "y_BTD", VECTORS),
    "generate": (
        lambda: partial(jax_moe.generate, CASES["mixtral"].make(), max_new_tokens=2, temperature=0), "", TOKENS,
    ),
    "loss": (lambda: lambda x_BTD: jax_moe.next_token_loss(x_BTD, jnp.asarray(TOKENS) % 8), "", VECTORS),
}


@pytest.mark.parametrize("name", CALLS)
def test_explicit_axes_without_jit(name: str) -> None:
    """Operations one by one give the same numbers, answers laid out as the input, and whole statistics."""
    make, field, host = CALLS[name]
    call, given = make(), jnp.asarray(host)
    mesh = explicit_mesh()

    def numbers(output: Any) -> dict[str, Any]:
        return {"answer": getattr(output, field) if field else output, "stats": getattr(output, "stats", ())}

    alone = numbers(call(given))
    with jax.set_mesh(mesh):
        placed = jax.device_put(given, NamedSharding(mesh, PartitionSpec("data")))
        found = numbers(call(placed))
        answer = found["answer"]
        wanted = PartitionSpec("data", *(None,) * (answer.ndim - 1)) if answer.ndim else PartitionSpec()
        assert jax.typeof(answer).sharding.spec == wanted
        assert all(set(jax.typeof(value).sharding.spec) <= {None} for value in jax.tree.leaves(found["stats"]))
        check_close(named(found), named(alone), 1e-6, name)


def test_explicit_axes_need_the_call_with_auto_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a layer's tracing raises."""
    layer = jax_moe.MoE(presets.mixtral(8, 6, 4, 2))
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        placed = jax.device_put(VECTORS, NamedSharding(mesh, PartitionSpec("data")))
        assert jax.eval_shape(lambda x_BTD: layer(x_BTD), placed)[0].shape == VECTORS.shape
        monkeypatch.setattr(explicit, "explicit_axes", lambda: ())
        with pytest.raises(Exception, match="unsharded over the sorting dimension"):
            jax.eval_shape(lambda x_BTD: layer(x_BTD), placed)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("all_to_all", presets.mixtral(8, 6, 4, 2), "exchange='all_to_all': must be padded, ring, ragged, xla or auto"),
        ("ring", presets.mixtral(8, 6, 3, 2), "mesh expert=2: must be a divisor of 3, the experts of the layer"),
        ("ragged", presets.mixtral(8, 6, 4, 2), "exchange='ragged': must be all_to_all, padded, ring, xla or auto on"),
        ("gossip", presets.mixtral(8, 6, 4, 2), "exchange='gossip': must be one of xla"),
    ],
)
def test_what_an_exchange_refuses(name: str, config: MoEConfig, message: str) -> None:
    """In one line, before anything runs."""
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    refused = pytest.raises(ValueError, match=f"^{re.escape(message)}")
    with jax.sharding.use_abstract_mesh(mesh), refused, sharding.exchange(name):
        sharding.exchange_in_use(config)


def test_positions_that_four_devices_share_take_a_third_of_the_memory() -> None:
    """At most 0.4 of a device's that has them alone (measured: 0.27); with the planted fault more (0.97)."""
    done = with_eight_devices("memory_of_positions")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    alone, shared, fault = map(int, done.stdout.split())
    assert shared <= 0.4 * alone < fault, (alone, shared, fault)


def test_steps_after_the_first_compile_nothing_and_copy_nothing_but_the_batch() -> None:
    """Neither from the host nor back; the programs of the first step are counted, and an unasked copy is found."""
    done = with_eight_devices("copies_of_steps")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    first, later, guard = done.stdout.splitlines()
    assert int(first) > 0 and int(later) == 0, (first, later)
    assert guard.startswith("found: INVALID_ARGUMENT: Disallowed host-to-device transfer"), guard


@pytest.mark.parametrize(
    ("group", "num_experts", "top_k", "wanted"),
    [
        ("", 8, 2, "padded"), ("", 64, 2, "padded"), ("", 64, 8, "ring"), ("batch", 8, 2, "padded"),
        ("batch", 64, 2, "padded"), ("batch", 64, 8, "ring"), ("sequence", 8, 2, "all_to_all"),
        ("sequence", 64, 2, "all_to_all"), ("sequence", 64, 8, "all_to_all"),
    ],
)
def test_auto_sends_the_least(group: str, num_experts: int, top_k: int, wanted: str) -> None:
    """The exchange that sends the fewest bytes in docs/scaling.md: 4096 tokens in 8 sequences on 8 devices."""
    config = presets.mixtral(64, 64, num_experts, top_k)
    config = config.with_capacity(1.0, group=group) if group else config
    longest = min(512, config.expert_capacity(config.group_size(8, 512)))
    assert fewest_rows(config, 8, 512, longest) == wanted


def test_faults_are_planted() -> None:
    """At least two, in some case: without them a comparison that never fails would pass."""
    assert sum(len(case.faults) for case in CASES.values()) >= 2
