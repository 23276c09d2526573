"""Sampling: which tokens remain, how often they are drawn, and which settings are refused."""

from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe import MakeMoE, MakeMoEConfig, generate
from jax_moe.generation.sampling import filter_logits
from parity_tests.shared.filled import filled

TINY = MakeMoEConfig(
    vocab_size=5, block_size=4, model_dim=4, num_heads=2, num_layers=1, num_experts=2, top_k=1, capacity_factor=None
)
SHARES = [0.10, 0.50, 0.15, 0.25]


def reference_filter(logits: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    """A plain loop over rows and tokens: takes the likeliest until there are k, or until they sum to top_p."""
    result = np.full(logits.shape, -np.inf)
    for row, out in zip(logits, result, strict=True):
        best_first = sorted(range(len(row)), key=lambda v: (-row[v], v))
        left = [v for v in best_first if top_k is None or row[v] >= row[best_first[min(top_k, len(row)) - 1]]]
        total, weight = sum(np.exp(row[v] - row.max()) for v in left), 0.0
        for v in left:
            if top_p is not None and weight >= top_p:
                break
            out[v] = row[v]
            weight += np.exp(row[v] - row.max()) / total
    return result


KEPT = [
    (None, None, [0, 1, 2, 3]),
    (1, None, [1]),
    (2, None, [1, 3]),
    (9, None, [0, 1, 2, 3]),
    (None, 0.45, [1]),  # one half is enough
    (None, 0.6, [1, 3]),  # 0.5 is not
    (None, 0.8, [1, 2, 3]),  # 0.75 is not
    (None, 1.0, [0, 1, 2, 3]),
    (3, 0.8, [1, 3]),  # of the three best 0.9 is left, and 0.75 / 0.9 = 0.83
    (None, 1e-9, [1]),  # the best always stays
]


@pytest.mark.parametrize(("top_k", "top_p", "kept"), KEPT)
def test_filter_by_hand(top_k: int | None, top_p: float | None, kept: list[int]) -> None:
    logits = np.log(np.asarray([SHARES], np.float32))
    want = np.full((1, 4), -np.inf, np.float32)
    want[0, kept] = logits[0, kept]
    np.testing.assert_array_equal(filter_logits(jnp.asarray(logits), top_k, top_p), want)
    np.testing.assert_array_equal(reference_filter(logits, top_k, top_p).astype(np.float32), want)


def test_ties_at_the_kth_place_all_stay() -> None:
    got = filter_logits(jnp.asarray([[1.0, 2.0, 1.0, 0.0]], jnp.float32), top_k=2)
    np.testing.assert_array_equal(got, np.asarray([[1, 2, 1, -np.inf]], np.float32))


@pytest.mark.parametrize(("top_k", "top_p"), [(7, None), (None, 0.7), (20, 0.9), (3, 0.5)])
def test_filter_against_the_plain_loop(top_k: int | None, top_p: float | None) -> None:
    logits = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32) * 3
    np.testing.assert_array_equal(
        filter_logits(jnp.asarray(logits), top_k, top_p), reference_filter(logits, top_k, top_p).astype(np.float32)
    )


def tiny(seed: int) -> MakeMoE:
    return filled(lambda: MakeMoE(TINY, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float32")), seed)


@pytest.fixture(scope="module")
def dice() -> MakeMoE:
    """A model with constant probabilities: 1/10, 1/2, 3/20, 1/4, and 0 for the last token."""
    model = tiny(0)
    model.head.kernel[...] = jnp.zeros((4, 5), jnp.float32)
    model.head.bias[...] = jnp.asarray([*map(log, SHARES), -1e9], jnp.float32)
    return model


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"temperature": 1.0}, SHARES),
        ({"temperature": 0.5}, [0.01, 0.25, 0.0225, 0.0625]),  # the squares
        ({"temperature": 2.0}, [0.1**0.5, 0.5**0.5, 0.15**0.5, 0.5]),  # the roots
        ({"top_k": 2}, [0, 0.5, 0, 0.25]),
        ({"top_p": 0.8}, [0, 0.5, 0.15, 0.25]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should(dice: MakeMoE, settings: dict, shares: list[float]) -> None:
    prompt = jnp.zeros((64, 1), jnp.int32)
    drawn = np.asarray(generate(dice, prompt, max_new_tokens=40, key=jax.random.key(0), **settings))[:, 1:]
    counts, expected = np.bincount(drawn.ravel(), minlength=5), np.asarray([*shares, 0]) / sum(shares) * drawn.size
    assert not counts[expected == 0].any(), "a filtered token was drawn"
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 16.3, f"{counts} for {expected}"  # exceeded with probability 1/1000 at three degrees of freedom


@pytest.fixture(scope="module")
def model() -> MakeMoE:
    return tiny(1)


def test_greedy_is_argmax_over_the_window(model: MakeMoE) -> None:
    prompt = jnp.asarray([[1, 2, 3], [4, 0, 2]], jnp.int32)
    tokens, logits_of = np.asarray(prompt), jax.jit(lambda tokens: model(tokens))
    for _ in range(6):
        logits = logits_of(tokens[:, -TINY.block_size :])
        tokens = np.concatenate([tokens, np.asarray(logits)[:, -1].argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(generate(model, prompt, max_new_tokens=6, temperature=0), tokens)
    assert not (tokens[0] == tokens[1]).all()


def test_a_key_decides(model: MakeMoE) -> None:
    prompt = jnp.asarray([[1, 2]], jnp.int32)
    first, again, other = (
        np.asarray(generate(model, prompt, max_new_tokens=30, key=jax.random.key(seed))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(set(first[0, 2:])) > 1


def test_long_prompts_are_cropped(model: MakeMoE) -> None:
    prompt = jnp.asarray([[3, 3, 0, 1, 2, 4, 0]], jnp.int32)
    whole = np.asarray(generate(model, prompt, max_new_tokens=8, temperature=0))
    cropped = np.asarray(generate(model, prompt[:, -4:], max_new_tokens=8, temperature=0))
    np.testing.assert_array_equal(whole[:, :7], prompt)
    np.testing.assert_array_equal(whole[:, 7:], cropped[:, 4:])


BAD = [
    ([[5]], {"temperature": 0}, r"token 5: must be 0 to 4 \(vocab_size=5\)"),
    ([[-1, 0]], {"temperature": 0}, r"token -1: must be 0 to 4 \(vocab_size=5\)"),
    ([[]], {"temperature": 0}, r"tokens_BT has 0 positions: must be 1 to block_size=4"),
    ([[0]], {"temperature": -1.0, "key": 0}, r"temperature=-1\.0: must be 0 \(greedy\) or above"),
    ([[0]], {"temperature": float("nan"), "key": 0}, r"temperature=nan: must be 0 \(greedy\) or above"),
    ([[0]], {"top_p": 1.5, "key": 0}, r"top_p=1\.5: must be None or above 0 and at most 1"),
    ([[0]], {"top_p": 0.0, "key": 0}, r"top_p=0\.0: must be None or above 0 and at most 1"),
    ([[0]], {"top_k": 0, "key": 0}, r"top_k=0: must be None or at least 1"),
    ([[0]], {"max_new_tokens": 0, "temperature": 0}, r"max_new_tokens=0: must be at least 1"),
    ([[0]], {}, r"temperature=1\.0: must be 0 without a key: sampling needs key="),
]


@pytest.mark.parametrize(("tokens", "settings", "message"), BAD, ids=[case[2] for case in BAD])
def test_errors(model: MakeMoE, tokens: list, settings: dict, message: str) -> None:
    settings = {"max_new_tokens": 3, **settings}
    if "key" in settings:
        settings["key"] = jax.random.key(settings["key"])
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(model, jnp.asarray(tokens, jnp.int32), **settings)
