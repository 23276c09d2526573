"""Every known mixture against the module in `transformers`."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

from parity_tests.families.cases import CASES  # noqa: E402
from parity_tests.families.checks import COLUMNS, Runs  # noqa: E402


@pytest.mark.parametrize("model_type", CASES)
def test_against_transformers(model_type: str, tmp_path: Path) -> None:
    runs = Runs(CASES[model_type], tmp_path)
    for column in COLUMNS:
        if not column.lacks(runs.case):
            column(runs)
