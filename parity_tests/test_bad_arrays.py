"""Whoever hands over an array of another shape, kind or range is told which, and what it must be; nobody gets wrong numbers.

Shapes and kinds run in a process of their own (see `bad_arrays.py`); what depends on values runs here too.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.bad_arrays import CASES, JAX_CASES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """What jax_moe says to every case."""
    return answers("jax")


def answers(framework: str) -> dict[str, str]:
    """What a framework says to every case, in a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-m", "parity_tests.bad_arrays", framework]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*CASES, *JAX_CASES])
def test_the_caller_is_told(told: dict[str, str], case: str) -> None:
    if case == "a torch tensor":
        pytest.importorskip("torch", reason="this leg has no PyTorch")
    wanted = (CASES | JAX_CASES)[case][2].format(array="an array")
    assert told[case].startswith(wanted) and "\n" not in told[case], told[case]
