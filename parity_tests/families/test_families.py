"""Every known mixture against the module in `transformers`; a type of the installed version that is not listed is
red.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe  # noqa: E402
from parity_tests.families import gaps  # noqa: E402
from parity_tests.families.__main__ import measure  # noqa: E402
from parity_tests.families.cases import CASES  # noqa: E402
from parity_tests.families.checks import COLUMNS, Runs  # noqa: E402
from parity_tests.families.page import PAGE, page, without_numbers  # noqa: E402
from parity_tests.shared.compare import MismatchError  # noqa: E402


@pytest.mark.parametrize("model_type", CASES)
def test_against_transformers(model_type: str, tmp_path: Path) -> None:
    measure(model_type, tmp_path)


def test_no_model_type_is_missing() -> None:
    """Each type of the installed transformers with routed experts has its row, or its reason, and none has both."""
    assert gaps.found() - CASES.keys() - gaps.GAPS.keys() == set()
    assert CASES.keys() & gaps.GAPS.keys() == set() and all(gaps.GAPS.values())
    assert gaps.IN_PART.keys() <= CASES.keys()


def test_the_page_is_fresh() -> None:
    """Names, columns and reasons of docs/families.md; `make families` writes it."""
    any_number = {name: {column.name: 0.0 for column in COLUMNS} for name in CASES}
    assert without_numbers(PAGE.read_text()) == without_numbers(page(any_number, "0.0.0"))


def exchange_gate_and_up(moe: jax_moe.MoE) -> None:
    moe.experts.gate[...], moe.experts.up[...] = moe.experts.up[...], moe.experts.gate[...]


def exchange_experts(moe: jax_moe.MoE) -> None:
    moe.router.kernel[...] = moe.router.kernel[...][:, ::-1]


def double_logits(moe: jax_moe.MoE) -> None:
    moe.router.kernel[...] = 2 * moe.router.kernel[...]


def one_entry(moe: jax_moe.MoE) -> None:
    moe.experts.down[...] = moe.experts.down[...].at[0, 0, 0].add(1e-3)


# Each column with a fault in our weights that it must find.
FAULTS = {
    "choices": exchange_experts, "output fp64": one_entry, "gradients fp64": one_entry, "output fp32": one_entry,
    "gradients fp32": exchange_gate_and_up, "torch_ref fp64": one_entry, "balance loss": double_logits,
    "round trip": one_entry,
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_column_finds_its_fault(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Runs.moe

    def faulty(self: Runs, shape: int, dtype: str) -> jax_moe.MoE:
        moe = loaded(self, shape, dtype)
        with jax.enable_x64(dtype == "float64"):
            FAULTS[name](moe)
        return moe

    monkeypatch.setattr(Runs, "moe", faulty)
    column = next(one for one in COLUMNS if one.name == name)
    with pytest.raises(MismatchError):
        column(Runs(CASES["mixtral"], tmp_path))


def test_the_column_of_folders_finds_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that takes another layer's tensors."""
    load = jax_moe.load_moe

    def other(directory: Path, layer: int) -> jax_moe.MoE:
        moe = load(directory, layer)
        moe.experts.down[...] = np.asarray(load(directory, layer - 1).experts.down[...])
        return moe

    monkeypatch.setattr(jax_moe, "load_moe", other)
    with pytest.raises(MismatchError):
        next(one for one in COLUMNS if one.name == "own folder")(Runs(CASES["mixtral"], tmp_path))
