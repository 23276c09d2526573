"""The parity table: every case against every column. `python -m parity_tests.table` writes docs/parity.md."""

import pytest

pytest.importorskip("torch", reason="the parity table compares with PyTorch: install the extra `test`")

from parity_tests.table import __main__ as table
from parity_tests.table import measure
from parity_tests.table.cases import CASES, Case
from parity_tests.table.checks import COLUMNS, Runs, check_measured, check_row, measured
from parity_tests.table.family_cases import CASES as FAMILY_CASES
from parity_tests.table.family_checks import FAMILY_COLUMNS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_row(case: Case) -> None:
    check_row(Runs(case), COLUMNS)


def test_every_cell_was_measured_and_none_is_above_what_is_promised() -> None:
    check_measured("cells", (case.name for case in CASES), COLUMNS)
    for case in CASES:
        for column in COLUMNS:
            reason = column.inapplicable(case)
            assert measured()["cells"][case.name][column.name] == reason or reason is None


def test_every_family_was_measured() -> None:
    check_measured("families", (case.name for case in FAMILY_CASES), FAMILY_COLUMNS)


def test_the_page_shows_the_measured_table() -> None:
    shown = table.between_markers(table.PAGE.read_text())
    assert shown is not None, f"docs/parity.md must hold the lines {table.BEGIN} and {table.END}"
    assert shown == table.render(), "docs/parity.md is behind measured.json: run python -m parity_tests.table"


def test_what_measures_can_be_sent_to_another_process() -> None:
    """A process spawned from `python -m` does not import `__main__`; rows that are not there are refused."""
    assert not measure.measure_row.__module__.endswith("__main__")
    with pytest.raises(ValueError, match="rows=mixtrall: must be rows of the table"):
        measure.measure(["mixtrall"])
