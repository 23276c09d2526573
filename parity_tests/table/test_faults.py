"""The table can fail: every planted fault is caught by the expected columns, and the message names its place."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the faults are planted into comparisons with PyTorch: install the extra `test`")

from parity_tests.shared.compare import MismatchError, check_close, check_exact
from parity_tests.table.cases import BY_NAME
from parity_tests.table.checks import COLUMN, Runs
from parity_tests.table.faults import FAULTS, Fault

PLANTED = [pytest.param(fault, name, id=f"{fault.name}: {name}") for fault in FAULTS for name in fault.cases]


@pytest.mark.parametrize(("fault", "case_name"), PLANTED)
def test_fault_turns_the_table_red(fault: Fault, case_name: str) -> None:
    runs = Runs(BY_NAME[case_name])
    for dtype in {COLUMN[name].dtype for name in fault.red}:  # planted, and compiled, once for all columns of a dtype
        pair = getattr(runs, dtype)
        assert pair.torch_outcome  # computed before the fault, which may sit in what both share
        with fault.plant(pair):
            for name, says in fault.red.items():
                if COLUMN[name].dtype == dtype:
                    with pytest.raises(MismatchError, match=says):
                        COLUMN[name].measure(runs, COLUMN[name].tolerance)


A = {"w": np.arange(6.0).reshape(2, 3), "b": np.ones(3)}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"w": A["w"]}, r"missing \['b'\]"),
        ({**A, "c": A["b"]}, r"unexpected \['c'\]"),
        ({**A, "w": A["w"].T}, r"w has shape \(3, 2\)"),
        ({**A, "w": A["w"] + [[0, 0, 0], [0, 1e-6, 0]]}, r"error 2e-07 at w\[1, 1\]"),
        ({**A, "b": np.array([1, np.nan, 1])}, r"b\[1\] of the actual side is nan"),
        ({**A, "b": np.array([1, 1, np.inf])}, r"b\[2\] of the actual side is inf"),
        ({**A, "b": np.zeros(3)}, r"error 1 at b\[0\]"),
    ],
)
def test_comparison_raises_and_says_where(changed: dict, says: str) -> None:
    with pytest.raises(MismatchError, match=says):
        check_close(changed, A, 1e-8, "here")


def test_comparison_of_a_zero_tensor_is_exact() -> None:
    with pytest.raises(MismatchError, match="error inf"):
        check_close({"w": np.full(2, 1e-300)}, {"w": np.zeros(2)}, 1.0, "here")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({**A, "b": A["b"].astype(np.float32)}, "b has dtype float32"),
        ({**A, "w": np.nextafter(A["w"], 9)}, r"w\[0, 0\] is 5e-324, expected 0.0 \(6 of 6"),
        ({**A, "w": A["w"] * [[-1, 1, 1], [1, 1, 1]]}, r"w\[0, 0\] is -0.0, expected 0.0 \(1 of 6"),
    ],
)
def test_exact_comparison_sees_every_bit(changed: dict, says: str) -> None:
    with pytest.raises(MismatchError, match=says):
        check_exact(changed, A, "here")


def test_comparison_accepts_what_is_equal_and_returns_the_error() -> None:
    assert check_close(A, A, 0.0, "here") == 0.0
    assert check_exact(A, A, "here") == 0.0
    assert check_close({**A, "w": A["w"] * (1 + 1e-9)}, A, 1e-8, "here") == pytest.approx(1e-9, rel=1e-6)
