"""Layers and models give the numbers of one device on any mesh: each in a process with eight virtual devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.sharding.on_meshes import CASES, MESHES
from parity_tests.shared.quick import LEVEL

ROOT = Path(__file__).parents[2]
# Of the answers, the gradients and the weights after ten steps: relative, in fp64
TOLERANCES = (1e-13, 9e-14, 3e-14)  # measured: 1.2e-14, 9.5e-15, 2.4e-15


def on_meshes(*words: str) -> subprocess.CompletedProcess[str]:
    """The program of `on_meshes.py` with eight devices."""
    flags = " ".join(f"--{name}={value}" for name, value in LEVEL.items())
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-W", "error", "-m", "parity_tests.sharding.on_meshes", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_one_device(name: str) -> None:
    done = on_meshes(name)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] in MESHES.values()
    for mesh, *errors in lines:
        assert all(float(error) <= limit for error, limit in zip(errors, TOLERANCES, strict=True)), (mesh, errors)


@pytest.mark.parametrize(
    ("fault", "says"),
    [("experts swapped", "dropless on data=2,tensor=2: answers"), ("gradient scaled", "router.kernel")],
)
def test_a_fault_on_the_mesh_is_found(fault: str, says: str) -> None:
    done = on_meshes("layer, dropless", fault)
    assert done.returncode == 1 and says in done.stderr.splitlines()[-1], done.stderr
