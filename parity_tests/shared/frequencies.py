"""How often tokens are drawn against how often they should be, by Pearson's chi-squared. Needs neither framework."""

import numpy as np

LEAST = 10  # draws that a bin should expect; rarer tokens share one
DTYPES = ("bfloat16", "float16", "float32", "float64")
# A standard normal in what is tested; 4 is exceeded once in 30,000 tests, and the seeds are fixed.
MOST = 4.0


def zipf(vocab_size: int) -> np.ndarray:
    """Logits of a Zipf distribution: token v has probability in proportion to 1 / (v + 1)."""
    return -np.log(np.arange(1, vocab_size + 1))


def shares(
    logits_V: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """The expected probabilities, in fp64: tokens are taken in order of probability until top_k or top_p is reached."""
    logits_V = np.asarray(logits_V, np.float64) / temperature
    order = np.argsort(-logits_V, kind="stable")
    if top_k is not None:
        order = order[logits_V[order] >= logits_V[order[top_k - 1]]]
    weight = np.exp(logits_V[order] - logits_V.max())
    weight /= weight.sum()
    kept = order if top_p is None else order[np.cumsum(weight) - weight < top_p]
    result = np.zeros(len(logits_V))
    result[kept] = weight[: len(kept)]
    return result / result.sum()


def surprise(tokens: np.ndarray, share_V: np.ndarray) -> float:
    """(chi-squared - its mean) / its standard deviation; infinite where a token was drawn that has no share."""
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(share_V))
    if len(counts) > len(share_V) or counts[share_V == 0].any():
        return float("inf")
    expected = share_V * counts.sum()
    bins = np.cumsum(np.where(expected >= LEAST, LEAST, expected)) // LEAST
    found, wanted = (np.bincount(bins.astype(int), weights=values) for values in (counts, expected))
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    return float((((found - wanted) ** 2 / wanted).sum() - freedom) / (2 * freedom) ** 0.5)
