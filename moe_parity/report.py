"""What a run of the microscope found: a sentence, a table on the terminal, JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_parity.stages import StageResult, first_divergence


@dataclass(frozen=True)
class Report:
    """All stages of one comparison, in the order of computation."""

    subject: str  # the family
    reference: str  # what it was compared with
    dtype: str
    shape: tuple[int, ...]  # of the batch
    replay: bool  # whether our side followed their choices
    results: tuple[StageResult, ...]
    explanation: str = ""  # which known convention makes the outputs the same

    @property
    def passed(self) -> bool:
        """Everything within tolerance."""
        return first_divergence(self.results) is None

    @property
    def flips(self) -> int:
        """Choices that differ at a near tie."""
        return sum(one.num_flips for one in self.results if one.passed)

    def sentence(self) -> str:
        """Where the frameworks part, if they do."""
        first = first_divergence(self.results)
        flips = [one for one in self.results if one.passed and one.num_flips]
        said = ""
        if flips:
            widest = max(flip.margin for one in flips for flip in one.flips)
            how = "replayed" if self.replay else "not replayed: what follows in these tokens differs"
            many = "choices differ" if self.flips > 1 else "choice differs"
            said = f"{self.flips} {many} at a near tie (margin at most {widest:.2g}; {how})"
        if first is None:
            return f"All {len(self.results)} stages agree within tolerance in {self.dtype}{'; ' + said if said else ''}."
        more = sum(not one.passed for one in self.results) - 1
        after = f"; {more} later stage{'s are' if more != 1 else ' is'} beyond tolerance too" if more else "; nothing else is"
        return (
            f"First divergence: {first.name}, error {first.error:.2g} where {first.tolerance:.0e} is allowed, a wrong number"
            f"{f' ({first.where})' if first.where else ''}{after}{'; ' + said if said else ''}."
            f"{' Conventions: ' + self.explanation + '.' if self.explanation else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, in plain values; an infinite error is null. `jax-moe parity --help` names the keys."""
        first = first_divergence(self.results)
        return {
            "subject": self.subject, "reference": self.reference, "dtype": self.dtype, "batch_shape": list(self.shape),
            "replay": self.replay, "passed": self.passed, "sentence": self.sentence(),
            "explanation": self.explanation,
            "first_divergence": None if first is None else first.name, "stages": [_stage(one) for one in self.results],
        }


def _stage(one: StageResult) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": one.name, "layer": one.layer, "kind": one.kind, "error": _finite(one.error), "tolerance": one.tolerance,
        "passed": one.passed, "verdict": one.verdict, "where": one.where,
    }
    if one.agreement is not None:
        values |= {
            "agreement": one.agreement, "num_flips": one.num_flips, "closest": one.closest and _finite(one.closest),
            "noise": one.noise,
            "flips": [
                {"index": list(f.index), "ours": f.ours, "theirs": f.theirs, "margin": _finite(f.margin), "near_tie": f.near_tie}
                for f in one.flips
            ],
        }
    return values


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def worst(results: Sequence[StageResult]) -> StageResult:
    """The one that fails, or comes closest to failing."""
    return max(results, key=lambda one: (not one.passed, strain(one)))


def strain(one: StageResult) -> float:
    """How much of its tolerance a stage uses: 1 is all of it."""
    if one.error == 0:
        return 0.0
    return one.error / one.tolerance if one.tolerance > 0 else math.inf


def parts(results: Sequence[StageResult]) -> dict[str, list[StageResult]]:
    """The stages as the table shows them: what lies before the layers, each layer, what lies after, gradients."""
    found: dict[str, list[StageResult]] = {}
    seen_layer = any(one.layer is not None for one in results)
    for one in results:
        if one.layer is not None:
            part = f"layer {one.layer}"
        elif one.kind in ("checkpoint", "gradient"):
            part = {"checkpoint": "weights", "gradient": "gradients"}[one.kind]
        elif one.kind == "embedding":
            part = "embedding"
        else:
            part = "after the layers" if seen_layer else "the layer"
        found.setdefault(part, []).append(one)
    return found


def print_table(report: Report) -> None:
    """The worst stage of every part, then the sentence; colours only on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    shape = " x ".join(map(str, report.shape))
    console.print(Text(f"{report.subject}: jax_moe against {report.reference}, {report.dtype}, batch {shape}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("where", no_wrap=True)
    table.add_column("stages", justify="right", no_wrap=True)
    table.add_column("worst stage", overflow="fold")
    for name in ("error", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for part, stages in parts(report.results).items():
        one = worst(stages)
        name = one.name.removeprefix(f"{part}: ")
        flips = sum(each.num_flips for each in stages)
        verdict = "FAILED" if not one.passed else f"ok, {flips} flipped at near ties" if flips else "ok"
        style = "" if one.passed and not flips else "yellow" if one.passed else "red"
        table.add_row(part, str(len(stages)), name, f"{one.error:.1e}", f"{one.tolerance:.0e}", Text(verdict, style=style))
    console.print(table)
    console.print(Text(report.sentence(), style="" if report.passed else "red"), soft_wrap=True)
