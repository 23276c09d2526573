"""The relative error, by pencil."""

import numpy as np
import pytest

from moe_parity.relative import largest, norm, relative_error
from moe_parity.stages import Stage, judge


def test_by_pencil() -> None:
    ours, theirs = np.array([[3.0, 4.5]]), np.array([[3.0, 4.0]])
    assert relative_error(ours, theirs) == 0.125
    assert relative_error(ours, theirs, norm) == 0.1
    assert relative_error(ours, theirs, largest, floor=50.0) == 0.01


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        ([0.0], [0.0], 0.0), ([1.0], [0.0], np.inf), ([np.nan], [np.nan], np.inf), ([np.inf], [1.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_where_a_quotient_has_no_value(ours: list[float], theirs: list[float], error: float) -> None:
    assert relative_error(np.asarray(ours), np.asarray(theirs)) == error


def test_the_difference_is_taken_in_float64() -> None:
    """In the dtype of the reference an error below its rounding would vanish, and a large one overflow."""
    assert relative_error(np.array([1 + 1e-9]), np.array([1], np.float32)) == pytest.approx(1e-9, rel=1e-6)
    assert relative_error(np.array([1.0]), np.array([2**-16], np.float16)) == 2**16 - 1
    assert relative_error(np.array([-6e4], np.float16), np.array([6e4], np.float16)) == 2.0
    stage = Stage("logits", None, "logits", np.array([1 + 1e-9]), np.array([1], np.float32), 1e-10)
    assert judge(stage).error == pytest.approx(1e-9, rel=1e-6) and not judge(stage).passed
