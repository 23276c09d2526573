"""A stage is one intermediate value of both sides; judged, it is within its tolerance or says where and why not.

Nothing here knows a framework or a model: numpy arrays in, results out. `Trace`s of two runs become stages by `pair`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# In the order in which a layer computes them; a gradient comes after all of them.
KINDS = (
    "checkpoint", "embedding", "attention_norm", "attention", "ffn_norm", "router_logits", "experts", "weights", "slots",
    "expert_outputs", "shared", "combined", "residual", "final_norm", "logits", "balance_loss", "loss", "gradient",
)
WORDS = {"ffn_norm": "norm before the FFN", "attention_norm": "norm before attention", "experts": "chosen experts",
         "shared": "shared expert", "residual": "residual stream"}
EXACT = ("checkpoint", "slots")  # not one value may differ
WORST_FLIPS = 100  # as many are kept, the widest margins first


def kind_in_words(kind: str) -> str:
    """`ffn_norm` is "norm before the FFN"."""
    return WORDS.get(kind, kind.replace("_", " "))


class Place(NamedTuple):
    """Where in a model a value is: its kind (one of KINDS, or any word), the layer, and what tells it from its likes."""

    kind: str
    layer: int | None = None
    name: str = ""

    @property
    def label(self) -> str:
        """In words: `layer 1: expert outputs`, `gradient of lm_head.weight`."""
        word = kind_in_words(self.kind)
        if self.kind == "gradient":
            word = f"gradient of {self.name}"
        elif self.name:
            word = f"{word} ({self.name})"
        return word if self.layer is None else f"layer {self.layer}: {word}"


Trace = Mapping[Place, np.ndarray]  # what one side computed, in the order in which it did
Scores = Mapping[Place, tuple[np.ndarray, np.ndarray]]  # of a stage of choices: what our side and theirs ranked
SMALL = 1e-3  # the share of the largest gradient's norm that a gradient's error is at least measured against


@dataclass(frozen=True)
class Stage:
    """One value of both sides and how far apart it may be.

    The error is max |ours - theirs| / max |theirs|; a gradient's is by norm (see `floor`), that of EXACT kinds the share of
    entries that differ. `scores` make a stage one of choices: what each side ranked [..., E], while `ours` and `theirs`
    [..., K] name the ranked, best first. Its error is then the widest margin of a choice that differs.
    """

    name: str
    layer: int | None
    kind: str
    ours: np.ndarray
    theirs: np.ndarray
    tolerance: float
    floor: float = 0.0  # the least scale that the difference is divided by
    scores: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Flip:
    """A choice that differs: where, who chose what, and how close the two competing scores are (the wider of both sides)."""

    index: tuple[int, ...]
    ours: int
    theirs: int
    margin: float
    noise: float  # a margin of at most this is within rounding

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin <= self.noise


@dataclass(frozen=True)
class StageResult:
    """What became of a stage. `verdict` is "same", "flip at a near tie" (which passes) or "wrong number"."""

    name: str
    layer: int | None
    kind: str
    error: float
    tolerance: float
    verdict: str
    where: str = ""  # the worst entry and both values, or what does not fit
    flips: tuple[Flip, ...] = ()
    num_flips: int = 0
    agreement: float | None = None  # of choices: the share that is the same
    closest: float | None = None  # of choices: the smallest margin at which one could change
    noise: float | None = None  # of choices: what of a margin is rounding

    @property
    def passed(self) -> bool:
        """Within tolerance."""
        return self.verdict != "wrong number"


def first_divergence(results: Sequence[StageResult]) -> StageResult | None:
    """The first stage beyond its tolerance; results stand in the order of computation."""
    return next((one for one in results if not one.passed), None)


def pair(ours: Trace, theirs: Trace, tolerances: Mapping[str, float], scores: Scores | None = None) -> list[Stage]:
    """The stages that both sides have, in our order; `tolerances` are by kind, "" any other.

    A gradient's scale is at least SMALL of the largest. Gradients of one side alone are stages with nothing on the other.
    """
    gradients = [place for place in {**ours, **theirs} if place.kind == "gradient"]
    common = [place for place in ours if place in theirs and place.kind != "gradient"]
    largest = max((norm(theirs[place]) for place in gradients if place in theirs), default=0.0)
    nothing = np.zeros(0)
    return [
        Stage(
            place.label, place.layer, place.kind, ours.get(place, nothing), theirs.get(place, nothing),
            0.0 if place.kind in EXACT else tolerances.get(place.kind, tolerances[""]),
            floor=SMALL * largest if place.kind == "gradient" else 0.0, scores=(scores or {}).get(place),
        )
        for place in [*common, *gradients]
    ]


def judge(stage: Stage) -> StageResult:
    """The comparison. Shapes that differ and values that are not finite are wrong numbers, infinitely far apart."""
    ours, theirs = np.asarray(stage.ours), np.asarray(stage.theirs)
    if ours.shape != theirs.shape:
        return _wrong(stage, f"ours is {ours.shape}, theirs {theirs.shape}" if ours.size and theirs.size else "on one side only")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return _wrong(stage, "NaN or infinity")
    if stage.scores is not None:
        return _judge_choices(stage, ours, theirs)
    if stage.kind in EXACT or not np.issubdtype(theirs.dtype, np.inexact):
        differ = np.asarray(ours != theirs)
        return _result(stage, float(differ.mean()) if differ.size else 0.0, _entry(ours, theirs, differ))
    size = norm if stage.kind == "gradient" else largest
    error = relative_error(ours, theirs, size, stage.floor)
    difference = np.asarray(np.abs(ours.astype(theirs.dtype) - theirs))
    return _result(stage, error, _entry(ours, theirs, difference))


def largest(values: np.ndarray) -> float:
    """The largest magnitude; 0 of nothing."""
    return float(np.abs(values).max(initial=0))


def norm(values: np.ndarray) -> float:
    """The Euclidean norm over all entries, in fp64."""
    return float(np.linalg.norm(np.asarray(values, np.float64).reshape(-1)))


def relative_error(
    ours: np.ndarray, theirs: np.ndarray, size: Callable[[np.ndarray], float] = largest, floor: float = 0.0
) -> float:
    """size(ours - theirs) / max(size(theirs), floor); infinite if theirs is all zero and ours is not, or one is not finite."""
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    difference, scale = size(np.asarray(ours.astype(theirs.dtype) - theirs)), max(size(theirs), floor)
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 else float("inf")


def _entry(ours: np.ndarray, theirs: np.ndarray, difference: np.ndarray) -> str:
    """The worst entry in words."""
    if not difference.any():
        return ""
    index = np.unravel_index(int(difference.argmax()), difference.shape)
    at = f"at {[int(i) for i in index]}: " if index else ""
    return f"{at}{ours[index]:.9g} here, {theirs[index]:.9g} there"


def _result(stage: Stage, error: float, where: str) -> StageResult:
    verdict = "same" if error <= stage.tolerance else "wrong number"
    return StageResult(stage.name, stage.layer, stage.kind, error, stage.tolerance, verdict, where)


def _wrong(stage: Stage, where: str) -> StageResult:
    return StageResult(stage.name, stage.layer, stage.kind, float("inf"), stage.tolerance, "wrong number", where)


def _judge_choices(stage: Stage, ours: np.ndarray, theirs: np.ndarray) -> StageResult:
    """Each differing choice by the margin of its two scores.

    Scores that agree within tolerance t of their largest can change places only where they are at most 2 t apart: that is
    the noise. A wider margin is another rule of choosing, or other scores.
    """
    assert stage.scores is not None
    mine, other = (np.asarray(one, np.float64) for one in stage.scores)
    noise = stage.tolerance * largest(np.where(np.isfinite(other), other, 0))
    differ = ours != theirs
    pairs = np.stack([_gap(scores, ours, theirs) for scores in (mine, other)]).max(axis=0) * differ
    order = np.argwhere(differ)[np.argsort(-pairs[differ], kind="stable")][:WORST_FLIPS]
    flips = tuple(
        Flip(tuple(map(int, at)), int(ours[tuple(at)]), int(theirs[tuple(at)]), float(pairs[tuple(at)]), noise) for at in order
    )
    widest = flips[0].margin if flips else 0.0
    ranked = -np.sort(-other, axis=-1)[..., : theirs.shape[-1] + 1]
    gaps = ranked[..., :-1] - ranked[..., 1:]
    verdict = "same" if not flips else "flip at a near tie" if widest <= noise else "wrong number"
    scale = noise / stage.tolerance if stage.tolerance > 0 else 0.0
    error = widest / scale if scale > 0 else (0.0 if widest == 0 else float("inf"))
    count = int(differ.sum())
    return StageResult(
        stage.name, stage.layer, stage.kind, error, stage.tolerance, verdict, _flips_in_words(flips, count, theirs.size),
        flips, count, agreement=1 - count / max(differ.size, 1), closest=float(gaps.min()) if gaps.size else None, noise=noise,
    )


def _gap(scores: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        gap = np.abs(np.take_along_axis(scores, ours, -1) - np.take_along_axis(scores, theirs, -1))
    return np.where(np.isnan(gap), np.inf, gap)


def _flips_in_words(flips: tuple[Flip, ...], count: int, choices: int) -> str:
    if not flips:
        return ""
    one = flips[0]
    return (
        f"{count} of {choices:,} differ; at {list(one.index)} expert {one.ours} here, {one.theirs} there, "
        f"margin {one.margin:.2g} {'within' if one.near_tie else 'beyond'} the noise of {one.noise:.2g}"
    )
