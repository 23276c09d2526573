"""Contracts beyond the table: Hypothesis draws any legal one and both sides must agree, choices exactly, in fp64.

25 contracts of sparse layers, equal on every run; `HYPOTHESIS_PROFILE=nightly` draws 600 new contracts each time. A
failure is shrunk and printed as the code of the smallest failing contract.
"""

import os
from collections.abc import Callable
from fractions import Fraction
from unittest import mock

import pytest

pytest.importorskip("torch", reason="drawn contracts are compared with PyTorch: install the extra `test`")

from hypothesis import Phase, example, given, note, settings
from hypothesis import strategies as st

import jax_moe.routing
from jax_moe import config as contracts
from jax_moe.config.attention import AttentionConfig
from jax_moe.config.models import BlockConfig
from jax_moe.config.moe import ExpertConfig, MoEConfig, RouterConfig, SoftMoEConfig
from parity_tests.shared.compare import MismatchError
from parity_tests.table.cases import Case, Draw, Mask
from parity_tests.table.checks import COLUMN, Runs
from parity_tests.table.drawn import as_code, attentions, blocks, moe_cases, soft_layers

CHECKED = ("experts and slots", "forward", "statistics", "input gradient", "parameter gradients", "loss gradients")
EXAMPLES = {"ci": (25, 8), "nightly": (600, 200)}  # of sparse layers, of the others
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
if PROFILE not in EXAMPLES:
    raise ValueError(f"HYPOTHESIS_PROFILE={PROFILE!r}: must be one of {', '.join(EXAMPLES)}")
SPARSE, OTHERS = (settings(max_examples=number, derandomize=PROFILE == "ci") for number in EXAMPLES[PROFILE])
MASKS = st.sampled_from([None, "ragged", "row", "all"])


def show(case: Case) -> Case:
    """The case; if it fails, Hypothesis prints the code that checks it."""
    note("from fractions import Fraction\nfrom jax_moe.config.moe import *\n"
         "from parity_tests.table.cases import Case\nfrom parity_tests.table.test_hypothesis import check\n"
         f"check({as_code(case)})")
    return case


def check(case: Case) -> None:
    """Raises MismatchError where the two sides differ."""
    runs = Runs(case)
    for name in CHECKED:
        if COLUMN[name].inapplicable(case) is None:
            COLUMN[name].measure(runs, COLUMN[name].limit)


# Found by drawing: with a softmax the weights of routed experts left the shared experts out of it
SHARED_IN_SOFTMAX = MoEConfig(
    model_dim=4, expert_dim=3, num_experts=3, top_k=1, router=RouterConfig(shared_experts=1),
    expert=ExpertConfig(shared_dim=3),
)


@SPARSE
@example(Case("drawn 1", SHARED_IN_SOFTMAX, num_positions=3, margin=0.0))
@given(moe_cases())
def test_any_sparse_layer(case: Case) -> None:
    check(show(case))


@OTHERS
@given(soft_layers() | attentions() | blocks(), st.integers(1, 3), st.integers(1, 5), MASKS, st.integers(0, 99))
def test_any_soft_layer_attention_or_block(
    config: Callable[[], SoftMoEConfig] | AttentionConfig | BlockConfig, batch_size: int, num_positions: int,
    mask: Mask | None, seed: int,
) -> None:
    draws: tuple[Draw, ...] = ("mask",) if mask else ()
    made = config() if callable(config) else config
    check(show(Case(f"drawn {seed}", made, batch_size, num_positions, draws, mask or "ragged", margin=0.0)))


@settings(max_examples=200, derandomize=True)
@given(moe_cases())
def test_printed_code_makes_the_same_contract(case: Case) -> None:
    assert eval(as_code(case), {**vars(contracts), "Case": Case, "Fraction": Fraction}) == case


def test_a_fault_is_found_and_its_contract_printed() -> None:
    right = jax_moe.routing.choice_weights

    @settings(max_examples=10, derandomize=True, phases=[Phase.generate])
    @given(moe_cases())
    def planted(case: Case) -> None:
        check(show(case))

    wrong = mock.patch.object(jax_moe.routing, "choice_weights", lambda *args: 1.001 * right(*args))
    with wrong, pytest.raises(MismatchError) as caught:
        planted()
    printed = "\n".join(caught.value.__notes__)
    assert "check(Case(name='drawn " in printed and "config=MoEConfig(model_dim=" in printed
