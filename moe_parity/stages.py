"""Stages: the intermediate values that two sides have in common, and the judgement whether they agree. Numpy only.

`ours` is the JAX side, `theirs` the reference. `pair` makes stages of two `Trace`s, `judge` a `StageResult` of a stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moe_parity.choices import Choices, Flip, Verdict, compare_choices
from moe_parity.relative import difference, largest, norm, relative_error

# In the order in which a layer computes them; gradients come last.
KINDS = (
    "checkpoint", "embedding", "attention_norm", "attention", "ffn_norm", "router_logits", "experts", "weights",
    "slots", "dispatch_weights", "combine_weights", "slot_inputs", "expert_outputs", "shared", "combined", "residual",
    "final_norm", "logits", "balance_loss", "loss", "gradient",
)
WORDS = {"ffn_norm": "norm before the FFN", "attention_norm": "norm before attention", "experts": "chosen experts",
         "shared": "shared expert", "residual": "residual stream"}
EXACT = ("checkpoint", "slots")  # no value may differ
SMALL = 1e-3  # a gradient's error is relative to at least this share of the largest gradient's norm

# How far apart two correct frameworks may be, by dtype and kind of stage ("": any other kind), relative to the stage's
# largest value, gradients by norm. Each limit has a comment with the worst error measured over the models of
# parity_tests/table/family_cases.py and the modules of parity_tests/microscope/test_microscope.py.
TOLERANCES: dict[str, dict[str, float]] = {
    "float64": {
        "": 2e-14,  # 2.2e-15, the answer of a mixture
        "router_logits": 1e-14,  # 1.3e-15
        "experts": 2e-14,  # twice router_logits: see choices.py
        "loss": 1e-15,  # 1.1e-16
        "balance_loss": 2e-15,  # 2.8e-16
        "gradient": 2e-13,  # 2.7e-14
    },
    "float32": {
        "": 1e-5,  # 2.0e-6, the answer of a mixture
        "router_logits": 5e-6,  # 9.1e-7
        "experts": 1e-5,  # twice router_logits: see choices.py
        "loss": 2e-6,  # 2.4e-7
        "balance_loss": 1e-6,  # 1.3e-7
        "gradient": 5e-5,  # 1.5e-5
    },
}


def kind_in_words(kind: str) -> str:
    """`ffn_norm` is "norm before the FFN"."""
    return WORDS.get(kind, kind.replace("_", " "))


class Place(NamedTuple):
    """Where in a model a value is: its kind (usually one of KINDS), its layer, and a name where several share both."""

    kind: str
    layer: int | None = None
    name: str = ""

    @property
    def label(self) -> str:
        """As `layer 1: expert outputs`, `gradient of lm_head.weight`."""
        word = kind_in_words(self.kind)
        if self.kind == "gradient":
            word = f"gradient of {self.name}"
        elif self.name:
            word = f"{word} ({self.name})"
        return word if self.layer is None else f"layer {self.layer}: {word}"


def places(stages: Mapping[str, Any], num_layers: int, mixtures: Sequence[int]) -> dict[Place, Any]:
    """A language model's stages by place: before the layers, layer by layer, and after them.

    A layer's stage has a leading dim that counts all layers, or the mixtures alone.
    """
    outside = {kind: stages[kind] for kind in ("embedding", "final_norm", "logits")}
    found: dict[int, dict[str, Any]] = {i: {} for i in range(num_layers)}
    for kind in sorted(stages.keys() - outside.keys(), key=KINDS.index):
        rows = mixtures if len(stages[kind]) == len(mixtures) else range(num_layers)
        for row, i in enumerate(rows):
            found[i][kind] = stages[kind][row]
    first = {Place("embedding"): outside.pop("embedding")}
    layers = {Place(kind, i): value for i, each in found.items() for kind, value in each.items()}
    return first | layers | {Place(kind): value for kind, value in outside.items()}


Trace = Mapping[Place, np.ndarray]  # the values that one side computed, in the order of computation
Scores = Mapping[Place, tuple[np.ndarray, np.ndarray]]  # for stages of choices: the scores that each side ranked


@dataclass(frozen=True)
class Stage:
    """A value of both sides, and how far apart the sides may be.

    The error is max |ours - theirs| / max |theirs|. The error of a gradient is by norm, that of EXACT kinds the share
    of entries that differ. With `scores` [..., E] of each side, the stage is one of choices: `ours` and `theirs`
    [..., K] are the experts chosen, best first, and the error is `Choices.error`.
    """

    name: str
    layer: int | None
    kind: str
    ours: np.ndarray
    theirs: np.ndarray
    tolerance: float
    floor: float = 0.0  # the difference is divided by at least this
    scores: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class StageResult:
    """The judgement of a stage. A "flip at a near tie" passes, a "wrong number" does not."""

    name: str
    layer: int | None
    kind: str
    error: float
    tolerance: float
    verdict: Verdict
    where: str = ""  # the worst entry with both values, or why the values cannot be compared
    # Only for stages of choices, as in `Choices`.
    flips: tuple[Flip, ...] = ()
    num_flips: int = 0
    agreement: float | None = None
    closest: float | None = None
    noise: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the stage is within its tolerance."""
        return self.verdict != "wrong number"


def first_divergence(results: Sequence[StageResult]) -> StageResult | None:
    """The first stage beyond its tolerance, of results in the order of computation."""
    return next((result for result in results if not result.passed), None)


def pair(ours: Trace, theirs: Trace, tolerances: Mapping[str, float], scores: Scores | None = None) -> list[Stage]:
    """The stages that both sides have, in the order of `ours`; `tolerances` are by kind, "" for any other.

    A gradient that only one side has is a stage too, with an empty array on the other side.
    """
    gradients = [place for place in {**ours, **theirs} if place.kind == "gradient"]
    common = [place for place in ours if place in theirs and place.kind != "gradient"]
    top = max((norm(theirs[place]) for place in gradients if place in theirs), default=0.0)
    nothing = np.zeros(0)
    return [
        Stage(
            place.label, place.layer, place.kind, ours.get(place, nothing), theirs.get(place, nothing),
            0.0 if place.kind in EXACT else tolerances.get(place.kind, tolerances[""]),
            floor=SMALL * top if place.kind == "gradient" else 0.0, scores=(scores or {}).get(place),
        )
        for place in [*common, *gradients]
    ]


def judge(stage: Stage) -> StageResult:
    """Compares both sides. The error is infinite where shapes differ or a value is not finite."""
    ours, theirs = np.asarray(stage.ours), np.asarray(stage.theirs)
    problem = why_incomparable(ours, theirs)
    if problem:
        return _result(stage, float("inf"), problem)
    if stage.scores is not None:
        return _result_of_choices(stage, compare_choices(ours, theirs, *stage.scores, stage.tolerance))
    if stage.kind in EXACT or not np.issubdtype(theirs.dtype, np.inexact):
        differ = np.asarray(ours != theirs)
        return _result(stage, float(differ.mean()) if differ.size else 0.0, worst_entry(ours, theirs, differ))
    error = relative_error(ours, theirs, norm if stage.kind == "gradient" else largest, stage.floor)
    return _result(stage, error, worst_entry(ours, theirs, difference(ours, theirs)))


def why_incomparable(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Why two arrays cannot be compared, or an empty string."""
    if ours.shape != theirs.shape:
        one_side = not ours.size or not theirs.size
        return "on one side only" if one_side else f"shape {ours.shape} in JAX, {theirs.shape} in the reference"
    return "" if np.isfinite(ours).all() and np.isfinite(theirs).all() else "NaN or infinity"


def worst_entry(ours: np.ndarray, theirs: np.ndarray, distance: np.ndarray) -> str:
    """The index of the largest difference and both values there; empty if there is none."""
    if not distance.any():
        return ""
    index = np.unravel_index(int(np.abs(distance).argmax()), distance.shape)
    at = f"at {[int(i) for i in index]}: " if index else ""
    return f"{at}{ours[index]:.9g} in JAX, {theirs[index]:.9g} in the reference"


def _result(stage: Stage, error: float, where: str) -> StageResult:
    verdict: Verdict = "same" if error <= stage.tolerance else "wrong number"
    return StageResult(stage.name, stage.layer, stage.kind, error, stage.tolerance, verdict, where)


def _result_of_choices(stage: Stage, choices: Choices) -> StageResult:
    return StageResult(
        stage.name, stage.layer, stage.kind, choices.error, stage.tolerance, choices.verdict, choices.in_words(),
        choices.flips, choices.num_flips, choices.agreement, choices.closest, choices.noise,
    )
