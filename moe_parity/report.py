"""The result of a comparison: as a sentence, as a table on the terminal, as JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_parity.stages import StageResult, first_divergence


@dataclass(frozen=True)
class Report:
    """All stages of a comparison, in the order of computation."""

    subject: str  # the family
    reference: str  # the PyTorch implementation it was compared with
    dtype: str
    shape: tuple[int, ...]  # of the batch
    replay: bool  # whether JAX followed the reference's choices of experts
    results: tuple[StageResult, ...]
    explanation: str = ""  # the known convention that explains the difference

    @property
    def passed(self) -> bool:
        """Whether every stage is within tolerance."""
        return first_divergence(self.results) is None

    @property
    def flips(self) -> int:
        """The number of choices that differ at a near tie."""
        return sum(stage.num_flips for stage in self.results if stage.passed)

    def sentence(self) -> str:
        """The first stage beyond tolerance, if there is one, and the flips at near ties."""
        first, flips = first_divergence(self.results), self._flips_in_words()
        if first is None:
            return f"All {len(self.results)} stages agree within tolerance in {self.dtype}{flips}."
        more = sum(not stage.passed for stage in self.results) - 1
        others = f"{more} later stage{'s are' if more != 1 else ' is'} beyond tolerance too" if more else "no other is"
        where = f" ({first.where})" if first.where else ""
        conventions = f" Conventions: {self.explanation}." if self.explanation else ""
        return (
            f"First divergence: {first.name}, error {first.error:.2g} where {first.tolerance:.0e} is allowed, "
            f"a wrong number{where}; {others}{flips}.{conventions}"
        )

    def _flips_in_words(self) -> str:
        margins = [flip.margin for stage in self.results if stage.passed for flip in stage.flips]
        if not margins:
            return ""
        what = f"{self.flips} {'choices differ' if self.flips > 1 else 'choice differs'} at a near tie"
        how = "replayed" if self.replay else "not replayed, so later stages of these tokens differ"
        return f"; {what} (margin at most {max(margins):.2g}; {how})"

    def to_json(self) -> dict[str, Any]:
        """The report in plain values; an infinite error is null. `jax-moe parity --help` explains the keys."""
        first = first_divergence(self.results)
        return {
            "subject": self.subject, "reference": self.reference, "dtype": self.dtype, "batch_shape": list(self.shape),
            "replay": self.replay, "passed": self.passed, "sentence": self.sentence(),
            "explanation": self.explanation,
            "first_divergence": None if first is None else first.name,
            "stages": [_stage_to_json(stage) for stage in self.results],
        }


def _stage_to_json(stage: StageResult) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": stage.name, "layer": stage.layer, "kind": stage.kind, "error": _finite(stage.error),
        "tolerance": stage.tolerance, "passed": stage.passed, "verdict": stage.verdict, "where": stage.where,
    }
    if stage.agreement is not None:
        values |= {
            "agreement": stage.agreement, "num_flips": stage.num_flips,
            "closest": stage.closest and _finite(stage.closest), "noise": stage.noise,
            "flips": [
                {
                    "index": list(flip.index), "ours": flip.ours, "theirs": flip.theirs,
                    "margin": _finite(flip.margin), "near_tie": flip.near_tie,
                }
                for flip in stage.flips
            ],
        }
    return values


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def worst(results: Sequence[StageResult]) -> StageResult:
    """The stage that fails, or comes closest to failing."""
    return max(results, key=lambda stage: (not stage.passed, strain(stage)))


def strain(stage: StageResult) -> float:
    """The error as a share of the tolerance."""
    if stage.error == 0:
        return 0.0
    return stage.error / stage.tolerance if stage.tolerance > 0 else math.inf


def parts(results: Sequence[StageResult]) -> dict[str, list[StageResult]]:
    """The stages by the rows of the table: weights, embedding, each layer, after the layers, gradients."""
    found: dict[str, list[StageResult]] = {}
    rest = "after the layers" if any(stage.layer is not None for stage in results) else "the layer"
    named = {"checkpoint": "weights", "gradient": "gradients", "embedding": "embedding"}
    for stage in results:
        part = f"layer {stage.layer}" if stage.layer is not None else named.get(stage.kind, rest)
        found.setdefault(part, []).append(stage)
    return found


def print_table(report: Report) -> None:
    """Prints the worst stage of every part, then the sentence; with colours only on a terminal."""
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
        shown = worst(stages)
        name = shown.name.removeprefix(f"{part}: ")
        flips = sum(stage.num_flips for stage in stages)
        verdict = "FAILED" if not shown.passed else f"ok, {flips} flipped at near ties" if flips else "ok"
        style = "" if shown.passed and not flips else "yellow" if shown.passed else "red"
        numbers = f"{shown.error:.1e}", f"{shown.tolerance:.0e}"
        table.add_row(part, str(len(stages)), name, *numbers, Text(verdict, style=style))
    console.print(table)
    console.print(Text(report.sentence(), style="" if report.passed else "red"), soft_wrap=True)
