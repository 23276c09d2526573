"""`torch_ref` refuses wrong tensors with the messages of `jax_moe`."""

import pytest

pytest.importorskip("torch", reason="this leg has no PyTorch")

from parity_tests.layers.bad_arrays import CASES
from parity_tests.layers.test_bad_arrays import answers


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """torch_ref's message for every case."""
    return answers("torch")


@pytest.mark.parametrize("case", CASES)
def test_the_caller_is_told(told: dict[str, str], case: str) -> None:
    wanted = CASES[case][2].format(array="a tensor")
    assert told[case].startswith(wanted) and "\n" not in told[case], told[case]
