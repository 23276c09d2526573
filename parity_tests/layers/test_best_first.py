"""The choice of the best scores: ties, infinities, signed zeros and NaN, in both frameworks, against a plain sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe.top_k import LARGEST_COUNT, best_first


def scores(kind: str, dtype: str) -> np.ndarray:
    """Rows of 13 numbers of the named kind."""
    score_SE = np.random.default_rng(0).normal(size=(40, 13)).astype(dtype)
    if kind == "tied":
        score_SE = np.round(score_SE)  # many equal numbers, -0 among them
    if kind == "mostly -inf":
        score_SE[score_SE < 1] = -np.inf  # as for filled clusters: fewer finite numbers than choices
    if kind == "NaN":
        score_SE[score_SE > 1] = np.nan
        score_SE[score_SE < -1] = -np.nan
    return score_SE


def by_sorting(score_SE: np.ndarray, count: int) -> np.ndarray:
    """Best first, lower index first among equals, NaN as inf."""
    return np.argsort(-np.where(np.isnan(score_SE), np.inf, score_SE) + 0.0, axis=-1, kind="stable")[:, :count]


@pytest.mark.parametrize("count", [1, 2, LARGEST_COUNT, LARGEST_COUNT + 1, 13])
@pytest.mark.parametrize("kind", ["random", "tied", "mostly -inf", "NaN"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_best_are_those_of_a_stable_sort(dtype: str, kind: str, count: int) -> None:
    score_SE = scores(kind, dtype)
    np.testing.assert_array_equal(best_first(jnp.asarray(score_SE), count), by_sorting(score_SE, count))


@pytest.mark.parametrize("kind", ["random", "tied", "mostly -inf", "NaN"])
def test_torch_chooses_the_same(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="the other framework")
    from torch_ref.top_k import best_first as in_torch

    score_SE = scores(kind, "float32")
    np.testing.assert_array_equal(in_torch(torch.from_numpy(score_SE), 5), best_first(jnp.asarray(score_SE), 5))
