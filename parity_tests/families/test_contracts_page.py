"""docs/guides/model_contracts.md is what the families say of the defaults of transformers' configuration classes."""

import dataclasses
import re

import pytest

from jax_moe import presets

transformers = pytest.importorskip("transformers", reason="the page is of the defaults of transformers")
from parity_tests.families import contracts  # noqa: E402


def test_the_page_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    text = contracts.PAGE.read_text(encoding="utf-8")
    written = re.search(r"`transformers` (\S+) whose", text)
    if written is None or written[1] != transformers.__version__:
        pytest.skip(f"the page is of transformers {written and written[1]}, here is {transformers.__version__}")
    found = contracts.contracts()
    monkeypatch.setattr(contracts, "contracts", lambda: found)
    assert contracts.page() == text, "python -m parity_tests.families.contracts --update"
    wrong = dataclasses.replace(found[0]["olmoe"], router=presets.mixtral().router)
    found[0]["olmoe"] = wrong
    assert contracts.page() != text


def test_what_nothing_reads_is_left_out() -> None:
    assert contracts.row(presets.mixtral()).startswith("`renormalise=sum`, `dtype=input` | - | - |")
    assert "`jitter_scope=block`" in contracts.row(presets.mixtral(jitter_eps=0.1))
    assert "`top_clusters=4`" in contracts.row(presets.deepseek_v3())
