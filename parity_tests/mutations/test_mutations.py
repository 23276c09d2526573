"""The table of mutations fits the sources. Running it takes minutes: `python -m parity_tests.mutations`."""

import dataclasses
from pathlib import Path

import pytest

from parity_tests.mutations import __main__ as mutations
from parity_tests.mutations.mutation_table import MUTATIONS


def test_no_mutation_is_stale() -> None:
    assert len(MUTATIONS) >= 40
    assert mutations.stale() == []
    assert all(one.rows or one.family or one.tests for one in MUTATIONS), "nothing would catch it"


def test_a_stale_one_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    gone = dataclasses.replace(MUTATIONS[0], old="nobody wrote this")
    same = dataclasses.replace(MUTATIONS[1], new=MUTATIONS[1].old)
    broken = dataclasses.replace(MUTATIONS[2], new="(")
    monkeypatch.setattr(mutations, "MUTATIONS", [gone, same, broken])
    assert len(mutations.stale()) == 3 and "is a syntax error" in mutations.stale()[2]
    assert mutations.main([]) == 2
    assert f"{gone.name}: 'nobody wrote this' stands 0 times in {gone.file}" in capsys.readouterr().err


def test_rows_columns_tests_and_families_exist() -> None:
    pytest.importorskip("torch", reason="the rows are of comparisons with PyTorch: install the extra `test`")
    from parity_tests.table.cases import BY_NAME
    from parity_tests.table.checks import COLUMN
    from parity_tests.table.family_cases import CASES

    families = {case.name for case in CASES}
    for one in MUTATIONS:
        assert set(one.rows) <= set(BY_NAME) and set(one.columns) <= set(COLUMN), one.name
        assert one.family in {"", *families}, one.name
        assert all((mutations.ROOT / test.split("::")[0]).exists() for test in one.tests), one.name


def test_listing_and_a_name_that_is_none(capsys: pytest.CaptureFixture) -> None:
    assert mutations.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(MUTATIONS)
    with pytest.raises(SystemExit):
        mutations.main(["--only", "no such mutation"])
    assert "no mutation has that in its name" in capsys.readouterr().err


def test_the_copy_is_whole(tmp_path: Path) -> None:
    mutations.copied(mutations.ROOT, tmp_path)
    assert mutations.stale(tmp_path) == []
