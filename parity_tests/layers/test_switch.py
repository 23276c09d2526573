"""Switch Transformers' sparse layer: against transformers where it is right, against the papers where it is not.

Checked with transformers 5.23.0, whose layer routes each sequence separately and drops tokens. Its disagreements with
the papers are in test_switch_findings.py.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip(
    "transformers", minversion="5.23", reason="needs the extra 'hf', at 5.23: before, the layer routed otherwise"
)

import torch

import jax_moe
from jax_moe import presets
from jax_moe.config.moe import BalanceConfig, CapacityConfig
from jax_moe.porting import PortError
from jax_moe.porting.torch_tensors import numpy_to_tensor
from parity_tests.layers.switch_cases import (
    FP32,
    SIZES,
    WIDE,
    Sizes,
    call,
    contract,
    mirror,
    mirror_numbers,
    our_numbers,
    ours,
    paper_numbers,
    state_of,
    their_numbers,
)
from parity_tests.shared.compare import MismatchError, check_close, check_exact

every_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"B{s.batch}T{s.length}E{s.experts}C{s.slots}")


@every_size
def test_against_transformers(sizes: Sizes) -> None:
    """Output, balance loss, z-loss and all gradients in fp32 with dropped tokens, for both packages."""
    theirs, x = sizes.theirs().train(), sizes.tokens().astype(np.float32)
    expected = their_numbers(theirs, x)
    layer = ours(contract(sizes), state_of(theirs))
    found, stats = our_numbers(layer, x)
    if sizes.length > 1:
        assert 0.1 < float(stats.dropped_fraction) < 0.9
    errors = [
        check_close(found, expected, FP32, "ours"),
        check_close(mirror_numbers(layer, x), expected, FP32, "torch_ref"),
    ]
    print(sizes, errors)


@pytest.mark.parametrize(("sizes", "group", "balance"), [
    (SIZES[0], "sequence", "batch"), (SIZES[0], "batch", "group"), (SIZES[1], "sequence", "group"),
    (SIZES[1], "batch", "batch"), (SIZES[2], "sequence", "group"), (SIZES[3], "batch", "batch"),
])
def test_against_the_papers(sizes: Sizes, group: str, balance: str) -> None:
    """Eq. 3's capacity with a factor that drops tokens, both groups, both ways to count the balance loss, in fp64."""
    x = sizes.tokens(2)
    state = {name: value.astype(np.float64) for name, value in state_of(sizes.theirs()).items()}
    config = contract(sizes, expert_capacity=None, capacity_factor=0.8).with_capacity(0.8, group=group)
    config = dataclasses.replace(config, balance=BalanceConfig(counted_in=balance))
    tokens = sizes.length * (1 if group == "sequence" else sizes.batch)
    slots = int(np.ceil(tokens * 4 / (5 * sizes.experts)))
    expected, dropped = paper_numbers(state, x, slots, group, balance)
    with jax.enable_x64(True):
        layer = ours(config, state)
        found, stats = our_numbers(layer, x)
        assert float(stats.dropped_fraction) == pytest.approx(len(dropped) / (sizes.batch * sizes.length), abs=1e-15)
        errors = [
            check_close(found, expected, WIDE, "ours"),
            check_close(mirror_numbers(layer, x), expected, WIDE, "torch_ref"),
        ]
    assert dropped or sizes.length == 1
    print(sizes, group, balance, errors)


def test_the_two_countings_of_the_balance_loss_differ() -> None:
    """A mean of products is not the product of means, so a test that confused them would fail."""
    sizes, x = SIZES[1], SIZES[1].tokens()
    state = state_of(sizes.theirs())
    losses = [
        float(paper_numbers(state, x, sizes.slots, "sequence", balance)[0]["balance"]) for balance in ("batch", "group")
    ]
    assert abs(losses[0] - losses[1]) > 0.05  # measured: 1.27 and 1.37


# Names


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype: str, bias: bool) -> None:
    """Into our layer and back: the same names, bits and dtypes; transformers loads them strictly; layouts match."""
    sizes = SIZES[2]
    theirs = sizes.theirs(router_bias=bias).to(getattr(torch, dtype))
    state, config = state_of(theirs), contract(sizes)
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, bias=bias))
    back = jax_moe.to_torch(ours(config, state), layout="switch")
    check_exact(back, state, "round trip")
    sizes.theirs(router_bias=bias).to(getattr(torch, dtype)).load_state_dict(
        {name: numpy_to_tensor(value) for name, value in back.items()}, strict=True
    )


def test_loading_is_strict() -> None:
    """A single error names everything that is wrong, by transformers' names."""
    state = state_of(SIZES[0].theirs())
    state["experts.expert_3.wi_0.weight"] = state.pop("experts.expert_3.wi.weight")
    state["router.classifier.weight"] = state["router.classifier.weight"][:3]
    with pytest.raises(PortError) as caught:
        ours(contract(SIZES[0]), state)
    assert (caught.value.missing, caught.value.unexpected) == (
        ["experts.expert_3.wi.weight"], ["experts.expert_3.wi_0.weight"]
    )
    assert caught.value.misshapen == ["router.classifier.weight is (3, 6), must be (4, 6)"]


# Planted faults, and settings that are refused


def swapped(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state with two experts exchanged."""
    names = {"experts.expert_0.": "experts.expert_1.", "experts.expert_1.": "experts.expert_0."}
    return {next((b + n.removeprefix(a) for a, b in names.items() if n.startswith(a)), n): v for n, v in state.items()}


@pytest.mark.parametrize("fault", ["experts", "slots", "order", "balance"])
def test_planted_fault_is_caught(fault: str) -> None:
    """Experts swapped, a slot too many, drops by probability, the other way to count the balance loss.

    Without a fault the comparison is `test_against_transformers`.
    """
    sizes, config = SIZES[1], contract(SIZES[1])
    theirs, x = sizes.theirs().train(), sizes.tokens().astype(np.float32)
    expected, state = their_numbers(theirs, x), state_of(theirs)
    if fault == "experts":
        state = swapped(state)
    elif fault == "balance":
        config = dataclasses.replace(config, balance=BalanceConfig())
    else:
        change = {"slots": sizes.slots + 1} if fault == "slots" else {"priority": "probability"}
        config = dataclasses.replace(config, capacity=dataclasses.replace(config.capacity, **change))
    with pytest.raises(MismatchError):
        check_close(our_numbers(ours(config, state), x)[0], expected, 1e3 * FP32, fault)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), [
    (lambda: CapacityConfig(slots=0), "slots=0: must be an integer of at least 1"),
    (lambda: presets.switch(expert_capacity=2.5), "slots=2.5: must be an integer of at least 1"),
    (lambda: BalanceConfig(counted_in="token"), "counted_in='token': must be one of 'batch', 'group', 'sequence'"),
    (
        lambda: BalanceConfig(counted_in="group", pooled="over_layers"),
        "counted_in='group': must be 'batch' when pooled='over_layers'",
    ),
])
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


def test_groups_of_padding_do_not_count() -> None:
    """A sequence of only padding does not count in the loss over groups."""
    sizes, x = SIZES[1], SIZES[1].tokens().astype(np.float32)
    layer = ours(contract(sizes), state_of(sizes.theirs()))
    mask = np.array([[True], [False], [True]]).repeat(sizes.length, axis=1)
    wanted = float(call(layer, x[[0, 2]])[1].load_balance_loss)
    assert float(call(layer, x, mask_BT=mask)[1].load_balance_loss) == pytest.approx(wanted, rel=1e-6)
    _, stats = mirror(layer)(torch.from_numpy(x), mask_BT=torch.from_numpy(mask))
    assert stats.load_balance_loss.item() == pytest.approx(wanted, rel=1e-6)
    _, stats = call(layer, x, mask_BT=np.zeros_like(mask))
    assert float(stats.load_balance_loss) == 0
