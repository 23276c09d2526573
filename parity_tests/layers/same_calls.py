"""What the calls of every layer and model have in common, checked in either framework.

`call(layer, x, **arrays)` takes numpy arrays and gives (answer, statistics) as numpy arrays.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from parity_tests.layers.bad_arrays import CHOICES, GIVEN, TAKES, E, X

Call = Callable[..., tuple[np.ndarray, tuple[np.ndarray, ...]]]
TABLE = {"moe": {"tokens_BT", "router_state_BTI"}}  # what a contract may ask for that the layers here do not have
OTHER = (CHOICES + 1) % E  # the choices of another run


def given(name: str, **changes: Any) -> dict[str, Any]:
    """An array for each that the layer takes."""
    return {array: GIVEN[array] for array in TAKES[name]} | changes


def check_names(call: Any, first: str, names: set[str]) -> None:
    """Raises unless a call takes `first` by position and exactly these by keyword, spelled out."""
    parameters = dict(inspect.signature(call).parameters)
    assert parameters.pop(first).kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert set(parameters) == names, set(parameters) ^ names


def same(one: Any, two: Any) -> None:
    """Raises unless two answers with their statistics are the same in every bit."""
    for first, second in zip((one[0], *one[1]), (two[0], *two[1]), strict=True):
        np.testing.assert_array_equal(first, second)


def check_form(call: Call, layer: Any, name: str) -> None:
    """Every array at once: an answer like the input, and finite statistics, of which the load sums to 1."""
    y_BTD, stats = call(layer, X, **given(name))
    assert y_BTD.shape == X.shape and y_BTD.dtype == X.dtype and np.isfinite(y_BTD).all()
    assert len(stats) == (0 if name == "attention" else 9) and all(np.isfinite(value).all() for value in stats)
    assert not stats or abs(stats[3].sum() - 1) < 1e-6  # expert_load_E; measured: 1.2e-7


def check_padding(call: Call, layer: Any, name: str) -> None:
    """What stands at padding reaches neither a real token nor a statistic; without the mask it does."""
    real, arrays = GIVEN["mask_BT"], given(name)
    other = np.where(real[..., None], X, 9 * X)

    def of_real(x: np.ndarray, **arrays: Any) -> tuple:
        y_BTD, stats = call(layer, x, **arrays)
        return y_BTD[real], stats

    same(of_real(X, **arrays), of_real(other, **arrays))
    arrays.pop("mask_BT")
    refused(same, of_real(X, **arrays), of_real(other, **arrays))


def by_parts(block: Any, x_BTD: Any, **arrays: Any) -> Any:
    """What a block computes, through the calls of its parts."""
    of_attention, of_mixture = ({name: arrays[name] for name in TAKES[part]} for part in ("attention", "moe"))
    x_BTD = x_BTD + block.attention(block.attention_norm(x_BTD), **of_attention)
    y_BTD, stats = block.moe(block.moe_norm(x_BTD), **of_mixture)
    return x_BTD + y_BTD, stats


def check_replay(call: Call, block: Any) -> None:
    """A block's replay with every draw is its mixture's; other choices give other numbers."""
    parts, other = partial(by_parts, block), GIVEN | {"expert_BTK": OTHER}
    same(call(block, X, **GIVEN), call(parts, X, **GIVEN))
    same(call(block, X, **other), call(parts, X, **other))
    refused(same, call(block, X, **GIVEN), call(parts, X, **other))


def refused(check: Callable, *args: Any) -> None:
    """Raises unless the check raises AssertionError."""
    try:
        check(*args)
    except AssertionError:
        return
    raise AssertionError("a planted fault was not seen")


def model_arrays(num_layers: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """For the last positions of TOKENS: mask and choices of a model's call, and the draws of every layer."""
    choices = np.stack([CHOICES, OTHER, CHOICES][:num_layers])[:, :, 1:]
    cut = {name: value[..., 1:, 1:] if name.endswith("TU") else value[:, 1:] for name, value in GIVEN.items()}
    drawn = set(TAKES["block"]) - {"mask_BT", "expert_BTK"}
    draws = {name: np.stack([cut[name]] * num_layers) for name in drawn}
    return {"mask_BT": cut["mask_BT"], "expert_LBTK": choices}, draws
