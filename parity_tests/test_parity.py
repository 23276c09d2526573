"""The parity table: every case against every column. `python -m parity_tests.table` prints it."""

import pytest

pytest.importorskip("torch", reason="the parity table compares with PyTorch: install the extra `test`")

from parity_tests import table
from parity_tests.cases import CASES, Case
from parity_tests.checks import COLUMNS, Runs, measured
from parity_tests.compare import MismatchError, check_names
from parity_tests.hf_cases import CASES as FAMILY_CASES
from parity_tests.hf_checks import FAMILY_COLUMNS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_row(case: Case) -> None:
    runs, red = Runs(case), []
    for column in COLUMNS:
        if column.inapplicable(case) is None:
            try:
                column.measure(runs, column.tolerance)
            except MismatchError as error:
                red.append(f"{column.name}: {error}")
    if red:
        raise MismatchError("\n".join(red))


def test_every_cell_was_measured_and_none_is_left_over() -> None:
    cells = measured()["cells"]
    check_names(cells, {case.name: case for case in CASES}, "rows of measured.json")
    for case in CASES:
        check_names(cells[case.name], {column.name: column for column in COLUMNS}, f"columns of {case.name}")
        for column in COLUMNS:
            reason = column.inapplicable(case)
            assert cells[case.name][column.name] == reason or reason is None


def test_every_family_was_measured() -> None:
    rows = measured()["families"]
    check_names(rows, {case.name: case for case in FAMILY_CASES}, "families of measured.json")
    for name, row in rows.items():
        check_names(row, {column.name: column for column in FAMILY_COLUMNS}, f"columns of {name}")
        for column in FAMILY_COLUMNS:
            assert row[column.name] <= column.limit, f"{name}: {column.name}"


def test_no_measured_error_is_above_what_is_promised() -> None:
    for column in COLUMNS:
        for name, row in measured()["cells"].items():
            error = row[column.name]
            assert isinstance(error, str) or error <= column.limit, f"{name}: {column.name}"


def test_readme_shows_the_measured_table() -> None:
    shown = table.between_markers(table.README.read_text())
    assert shown is not None, f"README.md must hold the lines {table.BEGIN} and {table.END}"
    assert shown == table.render(), "README.md is behind measured.json: run python -m parity_tests.table"
