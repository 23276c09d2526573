"""Comparisons of torch's state dicts, bit for bit. Needs no torch itself."""

from typing import Any

from parity_tests.shared.compare import check_exact


def check_same_weights(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises unless two state dicts of a module are equal bit for bit."""
    check_exact(*({n: v.numpy() for n, v in whole.items()} for whole in (actual, expected)), "weights")


def check_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises unless two state dicts of an optimizer are equal bit for bit, and have the same groups."""
    assert actual["param_groups"] == expected["param_groups"] and actual["state"].keys() == expected["state"].keys()
    check_exact(*map(_flat, (actual, expected)), "optimizer state")


def _flat(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {f"{i} {k}": v.numpy() for i, entry in state_dict["state"].items() for k, v in entry.items()}
