"""The plots of the HTML page, as inline SVG: no script, no link; colours are the page's CSS classes.

Errors lie on a logarithmic axis; what is exactly 0 lies on the bottom line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from moe_parity.report import strain
from moe_parity.stages import KINDS, WORDS, StageResult

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 900, 64, 16, 14, 40
DEEP = 1e-4  # the share of its tolerance at which a cell of the map is palest
GRADIENTS = 24  # as many bars


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from the top of a plot to its bottom, in whole decades."""

    low: int
    high: int
    height: int

    def at(self, value: float) -> float:
        """Pixels from above; 0 and less at the bottom, infinity at the top."""
        if value <= 0:
            return float(TOP + self.height)
        place = self.high if math.isinf(value) else min(max(math.log10(value), self.low), self.high)
        return TOP + self.height * (self.high - place) / (self.high - self.low)

    def lines(self) -> list[str]:
        """A grid line and its number for every decade, or every second or third."""
        step = max(1, round((self.high - self.low) / 6))
        parts = []
        for power in range(self.high, self.low - 1, -step):
            y = self.at(10.0**power)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
        return parts


def axis_for(values: Sequence[float], height: int) -> Axis:
    """The decades that hold all values."""
    logs = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [0.0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return Axis(low - 1, max(high, low + 1) + (1 if any(map(math.isinf, values)) else 0), height)


def figure(height: int, parts: Sequence[str], label: str) -> str:
    """The picture, as wide as its place."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def journey(results: Sequence[StageResult]) -> str:
    """Every stage's error along the computation, under the line of what is allowed."""
    stages = [one for one in results if one.kind != "gradient" and one.tolerance > 0]
    axis = axis_for([one.error for one in stages] + [one.tolerance for one in stages], 260)
    step = (WIDTH - LEFT - RIGHT) / len(stages)
    x = [LEFT + step * (i + 0.5) for i in range(len(stages))]
    parts = axis.lines() + _layer_marks(stages, step, axis.height)
    allowed = " ".join(
        f"{LEFT + step * (i + side):.1f},{axis.at(one.tolerance):.1f}" for i, one in enumerate(stages) for side in (0, 1)
    )
    way = " ".join(f"{x[i]:.1f},{axis.at(one.error):.1f}" for i, one in enumerate(stages))
    parts += [f'<polyline class="allowed" points="{allowed}"/>', f'<polyline class="way" points="{way}"/>']
    radius = min(4.0, max(1.5, step / 2.5))
    for i, one in enumerate(stages):
        style = _style(one)
        parts.append(
            f'<circle class="{style}" cx="{x[i]:.1f}" cy="{axis.at(one.error):.1f}" r="{radius + 1.5 * (style != "same"):.1f}">'
            f"<title>{escape(one.name)}: {one.error:.2g} of {one.tolerance:.0e} {escape(one.where)}</title></circle>"
        )
    return figure(TOP + axis.height + BOTTOM, parts, "error of every stage")


def stage_map(results: Sequence[StageResult]) -> str:
    """One cell a layer and stage: the darker, the more of its tolerance it uses; red beyond it."""
    layers = sorted({one.layer for one in results if one.layer is not None})
    inside = [one for one in results if one.layer is not None and one.tolerance > 0]
    kinds = sorted({one.kind for one in inside}, key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))
    left, row = 170, 24
    width = min(64.0, (WIDTH - left - RIGHT) / max(len(layers), 1))
    parts = []
    for i, kind in enumerate(kinds):
        word = WORDS.get(kind, kind.replace("_", " "))
        parts.append(f'<text class="tick" x="{left - 10}" y="{TOP + row * i + 16}" text-anchor="end">{escape(word)}</text>')
    every = max(1, round(26 / width))
    bottom = TOP + row * len(kinds) + 16
    for j, layer in enumerate(layers):
        if j % every == 0:
            x = left + width * (j + 0.5)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom}" text-anchor="middle">{layer}</text>')
    for one in inside:
        assert one.layer is not None
        at = f'x="{left + width * layers.index(one.layer) + 1:.1f}" y="{TOP + row * kinds.index(one.kind) + 1}"'
        size = f'width="{max(width - 2, 1):.1f}" height="{row - 2}"'
        parts.append(
            f'<rect class="cell {_style(one)}" {at} {size} rx="2" fill-opacity="{_depth(one):.2f}">'
            f"<title>{escape(one.name)}: {one.error:.2g} of {one.tolerance:.0e}</title></rect>"
        )
    middle = left + width * len(layers) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{bottom + 18}" text-anchor="middle">layer</text>')
    return figure(bottom + 26, parts, "error by layer and stage")


def agreement(results: Sequence[StageResult]) -> str:
    """The share of choices that are the same, a bar a mixture."""
    mixtures = [one for one in results if one.agreement is not None]
    height, step = 120, (WIDTH - LEFT - RIGHT) / max(len(mixtures), 1)
    bar = min(48.0, step * 0.7)
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = TOP + height * (1 - share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
    for i, one in enumerate(mixtures):
        assert one.agreement is not None
        x, tall = LEFT + step * (i + 0.5), height * one.agreement
        parts.append(
            f'<rect class="{_style(one)}" x="{x - bar / 2:.1f}" y="{TOP + height - tall:.1f}" width="{bar:.1f}" '
            f'height="{tall:.1f}"><title>{escape(one.name)}: {one.agreement:.4%} the same, {one.num_flips} differ</title></rect>'
        )
    return figure(TOP + height + BOTTOM, parts + _mixture_marks(mixtures, step, height), "expert agreement by layer")


def margins(results: Sequence[StageResult]) -> str:
    """How close choices are: the closest of each mixture, those that flipped, and what of a margin is rounding."""
    mixtures = [one for one in results if one.closest is not None]
    every = [value for one in mixtures for value in (one.closest or 0, one.noise or 0, *(flip.margin for flip in one.flips))]
    axis, step = axis_for(every, 200), (WIDTH - LEFT - RIGHT) / max(len(mixtures), 1)
    parts = axis.lines()
    for i, one in enumerate(mixtures):
        assert one.closest is not None and one.noise is not None
        x = LEFT + step * (i + 0.5)
        y = axis.at(one.noise)
        parts.append(f'<line class="allowed" x1="{x - step / 2:.1f}" x2="{x + step / 2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        words = f"<title>{escape(one.name)}: the closest choice has a margin of {one.closest:.2g}</title>"
        parts.append(f'<circle class="closest" cx="{x:.1f}" cy="{axis.at(one.closest):.1f}" r="4">{words}</circle>')
        for flip in one.flips:
            style = "flip" if flip.near_tie else "wrong"
            words = f"<title>{list(flip.index)}: expert {flip.ours} here, {flip.theirs} there, margin {flip.margin:.2g}</title>"
            parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{axis.at(flip.margin):.1f}" r="5">{words}</circle>')
    return figure(TOP + axis.height + BOTTOM, parts + _mixture_marks(mixtures, step, axis.height), "margins of choices")


def gradients(results: Sequence[StageResult]) -> str:
    """The gradients with the largest errors, and what is allowed."""
    found = [one for one in results if one.kind == "gradient"]
    shown = sorted(found, key=lambda one: -one.error)[:GRADIENTS]
    left, row = 380, 20
    axis = axis_for([one.error for one in shown] + [shown[0].tolerance], WIDTH - left - RIGHT)

    def across(value: float) -> float:
        return left + axis.height - (axis.at(value) - TOP)

    bottom = TOP + row * len(shown)
    parts = []
    for power in range(axis.low, axis.high + 1, max(1, round((axis.high - axis.low) / 5))):
        x = across(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">1e{power}</text>')
    for i, one in enumerate(shown):
        y, name = TOP + row * i, one.name.removeprefix("gradient of ")
        name = name if len(name) <= 54 else f"...{name[-51:]}"
        parts.append(f'<text class="tick" x="{left - 10}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        long = max(across(one.error) - left, 1)
        words = f"<title>{escape(one.name)}: {one.error:.2g}</title>"
        parts.append(f'<rect class="{_style(one)}" x="{left}" y="{y + 3}" width="{long:.1f}" height="{row - 6}">{words}</rect>')
    x = across(shown[0].tolerance)
    parts.append(f'<line class="allowed" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
    return figure(bottom + 28, parts, "the largest gradient errors")


def _style(one: StageResult) -> str:
    return {"same": "same", "wrong number": "wrong"}.get(one.verdict, "flip")


def _depth(one: StageResult) -> float:
    """Opacity: pale at DEEP of the tolerance and less, full at all of it."""
    used = strain(one)
    if used <= DEEP:
        return 0.12
    return min(1.0, 0.12 + 0.88 * (1 - math.log10(min(used, 1.0)) / math.log10(DEEP)))


def _layer_marks(stages: Sequence[StageResult], step: float, height: int) -> list[str]:
    """Where each layer begins, numbered as far as there is room."""
    parts, last, numbered = [], None, -math.inf
    for i, one in enumerate(stages):
        if one.layer == last:
            continue
        last, x = one.layer, LEFT + step * i
        word = "after" if one.layer is None else f"layer {one.layer}"
        parts.append(f'<line class="layer" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + height}"/>')
        if i and x - numbered > 62 and WIDTH - RIGHT - x > 40:
            parts.append(f'<text class="tick" x="{x + 3:.1f}" y="{TOP + height + 18}">{word}</text>')
            numbered = x
    return parts


def _mixture_marks(mixtures: Sequence[StageResult], step: float, height: int) -> list[str]:
    every = max(1, round(30 / step)) if step else 1
    return [
        f'<text class="tick" x="{LEFT + step * (i + 0.5):.1f}" y="{TOP + height + 18}" text-anchor="middle">'
        f"{'' if one.layer is None else f'layer {one.layer}' if step > 60 else one.layer}</text>"
        for i, one in enumerate(mixtures) if i % every == 0
    ]
