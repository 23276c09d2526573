"""Every Hugging Face family against `transformers`: its rows of the parity table, and faults that they must catch."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe
from parity_tests.shared.compare import MismatchError, check_close
from parity_tests.table.checks import check_row
from parity_tests.table.family_cases import CASES, Case, batch
from parity_tests.table.family_checks import FAMILY_COLUMNS, OPTIMIZER, FamilyRuns, stepper, to_jax

pytestmark = pytest.mark.usefixtures("quick", "small_programs")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_row(case: Case, tmp_path: Path) -> None:
    """Every column of the case."""
    check_row(FamilyRuns(case, tmp_path), FAMILY_COLUMNS)


def swap(model: jax_moe.Decoder) -> None:
    """Exchanges gate and up of every expert."""
    experts = model.moe.experts
    experts.gate[...], experts.up[...] = experts.up[...], experts.gate[...]


def shift_layers(model: jax_moe.Decoder) -> None:
    """Exchanges the mixtures of two layers."""
    model.moe.router.kernel[...] = jnp.roll(model.moe.router.kernel[...], 1, axis=0)


def mix_heads(model: jax_moe.Decoder) -> None:
    """Reverses the query heads, so that other key heads serve them."""
    model.blocks.attention.query[...] = model.blocks.attention.query[...][:, :, ::-1]
    model.blocks.attention.out[...] = model.blocks.attention.out[...][:, ::-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> FamilyRuns:
    """The first case, without a fault."""
    return FamilyRuns(CASES[0], tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", [swap, shift_layers, mix_heads], ids=lambda fault: fault.__name__)
def test_planted_fault_is_caught(runs: FamilyRuns, fault: Any) -> None:
    """Weights in the wrong place, though every shape is right."""
    limit = {column.name: column.tolerance for column in FAMILY_COLUMNS}["fp32 logits"]
    check_close(*runs.float32.logits, limit, "without a fault")
    model = jax_moe.load_pretrained(runs.folder)  # a copy, as the fault is made in place
    fault(model)
    data = batch(runs.case, seed=2)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    output = stepper(graphdef, False, runs.case.learning_rate)(params, rest, OPTIMIZER.init(params), to_jax(data))[1]
    with pytest.raises(MismatchError, match="logits"):
        check_close({"logits": output.logits_BTV[data["mask"]]}, runs.float32.logits[1], 1e3 * limit, fault.__name__)
