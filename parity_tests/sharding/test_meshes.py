"""Layers and models give the numbers of one device on any mesh: each in a process with eight virtual devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.sharding.on_meshes import CASES, EXCHANGES
from parity_tests.shared.quick import LEVEL

ROOT = Path(__file__).parents[2]
# Of the answers, the gradients and the weights after ten steps: relative, in fp64
TOLERANCES = (1.2e-13, 2.9e-14, 5.4e-14)  # measured: 1.2e-14, 2.9e-15, 5.4e-15


def with_eight_devices(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A program of this folder with eight devices."""
    flags = " ".join(f"--{name}={value}" for name, value in LEVEL.items())
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-W", "error", "-m", f"parity_tests.sharding.{program}", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_one_device(name: str) -> None:
    """On every mesh of its kind; planted faults are found."""
    done, case = with_eight_devices("on_meshes", name), CASES[name]
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = done.stdout.splitlines()
    meshes = case.meshes
    assert [line.split()[0] for line in lines[: len(meshes)]] == meshes
    exchanges = EXCHANGES if case.is_layer else ()
    results, lines = lines[: len(meshes) + len(exchanges)], lines[len(meshes) + len(exchanges) :]
    if exchanges and results[len(meshes)].startswith("refused: exchange='all_to_all'"):  # there is no capacity
        del results[len(meshes)]
        exchanges = exchanges[1:]
    assert [line.split()[0] for line in results[len(meshes) :]] == list(exchanges)
    assert lines == [f"found: {fault}" for fault, _ in case.faults]
    for line in results:
        errors = map(float, line.split()[1:])
        assert all(error <= limit for error, limit in zip(errors, TOLERANCES, strict=True)), line


def test_positions_that_four_devices_share_take_a_third_of_the_memory() -> None:
    """At most 0.4 of a device's that has them alone (measured: 0.27); with the planted fault more (0.97)."""
    done = with_eight_devices("memory_of_positions")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    alone, shared, fault = map(int, done.stdout.split())
    assert shared <= 0.4 * alone < fault, (alone, shared, fault)


def test_faults_are_planted() -> None:
    """At least two, in some case: without them a comparison that never fails would pass."""
    assert sum(len(case.faults) for case in CASES.values()) >= 2
