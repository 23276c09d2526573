"""The choices of experts on two sides: where they differ, and whether rounding explains it. Numpy only.

The margin of a choice that differs is the difference of the two competing scores, on the side where it is wider. Scores
that agree within t can change places only where they are at most 2 t apart. So rounding explains a margin of at most
`tolerance` times the largest score, where `tolerance` is twice the relative error that the scores may have. A wider
margin means another rule of choosing, or other scores.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["same", "flip at a near tie", "wrong number"]
WORST_FLIPS = 100  # at most so many flips are kept


@dataclass(frozen=True)
class Flip:
    """A choice that differs: its index, the expert that each side chose, and the margin between their scores."""

    index: tuple[int, ...]
    ours: int
    theirs: int
    margin: float
    noise: float  # rounding explains a margin of at most this

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains the flip."""
        return self.margin <= self.noise


@dataclass(frozen=True)
class Choices:
    """Every choice of a mixture on both sides, compared."""

    flips: tuple[Flip, ...]  # at most WORST_FLIPS, the widest margin first
    num_flips: int
    num_choices: int
    scale: float  # the largest score
    noise: float  # rounding explains a margin of at most this
    closest: float | None  # the smallest margin at which a choice could have changed; None without a choice

    @property
    def widest(self) -> float:
        """The widest margin of a flip; 0 if all choices are equal."""
        return self.flips[0].margin if self.flips else 0.0

    @property
    def error(self) -> float:
        """The widest margin of a flip divided by the largest score."""
        if self.widest == 0:
            return 0.0
        return self.widest / self.scale if self.scale > 0 else float("inf")

    @property
    def agreement(self) -> float:
        """The share of choices that are equal."""
        return 1 - self.num_flips / max(self.num_choices, 1)

    @property
    def verdict(self) -> Verdict:
        """A flip at a near tie passes; a flip with a wider margin is a wrong number."""
        if not self.flips:
            return "same"
        return "flip at a near tie" if self.widest <= self.noise else "wrong number"

    def in_words(self) -> str:
        """How many choices differ, and the widest flip; empty if all are equal."""
        if not self.flips:
            return ""
        worst = self.flips[0]
        return (
            f"{self.num_flips} of {self.num_choices:,} choices differ; at {list(worst.index)} JAX chose expert "
            f"{worst.ours}, the reference {worst.theirs}; the margin of {worst.margin:.2g} is "
            f"{'within' if worst.near_tie else 'beyond'} the {self.noise:.2g} that rounding explains"
        )


def compare_choices(
    ours: np.ndarray, theirs: np.ndarray, our_scores: np.ndarray, their_scores: np.ndarray, tolerance: float
) -> Choices:
    """Compares experts [..., K], best first, that each side chose by scores [..., E]."""
    our_scores, their_scores = our_scores.astype(np.float64), their_scores.astype(np.float64)
    scale = float(np.abs(their_scores[np.isfinite(their_scores)]).max(initial=0))
    noise = tolerance * scale
    margins = np.maximum(margins_of(our_scores, ours, theirs), margins_of(their_scores, ours, theirs))
    flips = widest_flips(ours, theirs, margins, noise)
    closest = closest_margin(their_scores, theirs.shape[-1])
    return Choices(flips, int((ours != theirs).sum()), ours.size, scale, noise, closest)


def margins_of(scores: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """|score of our expert - score of theirs| of every choice [..., K]; infinite if both scores are infinite."""
    with np.errstate(invalid="ignore"):
        margins = np.abs(np.take_along_axis(scores, ours, -1) - np.take_along_axis(scores, theirs, -1))
    return np.where(np.isnan(margins), np.inf, margins)


def widest_flips(ours: np.ndarray, theirs: np.ndarray, margins: np.ndarray, noise: float) -> tuple[Flip, ...]:
    """The WORST_FLIPS choices that differ by the widest margins, the widest first."""
    differ = ours != theirs
    widest_first = np.argsort(-margins[differ], kind="stable")[:WORST_FLIPS]
    places = [tuple(map(int, place)) for place in np.argwhere(differ)[widest_first]]
    return tuple(Flip(at, int(ours[at]), int(theirs[at]), float(margins[at]), noise) for at in places)


def closest_margin(scores: np.ndarray, top_k: int) -> float | None:
    """The smallest difference between neighbours among the top_k + 1 best scores, where a choice would change first."""
    best = -np.sort(-scores, axis=-1)[..., : top_k + 1]
    gaps = best[..., :-1] - best[..., 1:]
    return float(gaps.min()) if gaps.size else None
