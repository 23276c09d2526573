"""The plots: those of the HTML page as inline SVG, and the picture of a compared training run.

Errors lie on a logarithmic axis; an error of exactly 0 lies on its lower end.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from jax_moe.disk import writing
from moe_parity.pages.style import COLOURS
from moe_parity.report import strain
from moe_parity.stages import KINDS, StageResult, kind_in_words
from moe_parity.training.runs import MOVED, Runs

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "font.sans-serif": ["DejaVu Sans"],
    "text.color": COLOURS["soft"],
    "xtick.color": COLOURS["soft"], "ytick.color": COLOURS["soft"], "axes.labelcolor": COLOURS["soft"],
    "axes.edgecolor": COLOURS["line"], "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": COLOURS["line"],
}
WIDTH = 9.5  # inches, of 72 units each
ROW = 0.25  # inches
TIP = "tip: "  # an id that begins with this becomes a tooltip with the rest of the id
PALEST = 1e-4  # the share of its tolerance at which a cell of the map is palest
MOST_GRADIENTS = 24
MOST_LABELS = 14  # on a horizontal axis

Draw = Callable[[Figure, Sequence[StageResult]], None]


def svg(draw: Draw, stages: Sequence[StageResult], label: str) -> str:
    """A drawing as an element of a page: no link, no script, no date, text as text, the same bytes every time."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": label}):
        figure, file = Figure(layout="constrained"), io.BytesIO()
        draw(figure, stages)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    inside = set(re.findall(r"#(\w+)", text))  # ids that the drawing itself refers to
    root = ElementTree.fromstring(text)
    for element in list(root.iter()):
        for child in [node for node in element if node.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        name = element.get("id", "")
        if name not in inside:
            element.attrib.pop("id", None)
        if name.startswith(TIP):
            ElementTree.SubElement(element, "title").text = name.removeprefix(TIP)
    root.attrib |= {"role": "img", "aria-label": label}
    text = ElementTree.tostring(root, encoding="unicode")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def errors(figure: Figure, stages: Sequence[StageResult]) -> None:
    """Every stage's error in the order of computation, and the tolerance."""
    axes = _axes(figure, 4.0)
    place = _log_axis(axes, "y", [value for stage in stages for value in (stage.error, stage.tolerance)])
    edges = np.arange(len(stages) + 1) - 0.5
    axes.stairs([stage.tolerance for stage in stages], edges, baseline=None, color=COLOURS["allowed"], linestyle="--")
    axes.plot([place(stage.error) for stage in stages], color=COLOURS["soft"], linewidth=0.7)
    for i, stage in enumerate(stages):
        _dot(
            axes, i, place(stage.error), verdict_class(stage),
            f"{stage.name}: {_error(stage)}; {stage.where}".rstrip("; "),
        )
    begins = [i for i, stage in enumerate(stages) if i == 0 or stage.layer != stages[i - 1].layer]
    words = [("after" if i else "") if stages[i].layer is None else f"layer {stages[i].layer}" for i in begins]
    _label(axes, begins, words)
    axes.set_xlim(-0.5, len(stages) - 0.5)


def stage_map(figure: Figure, stages: Sequence[StageResult]) -> None:
    """A cell for each layer and kind of stage: the fuller its colour, the more of its tolerance the stage uses."""
    layers = sorted({stage.layer for stage in stages if stage.layer is not None})
    kinds = sorted(
        {stage.kind for stage in stages}, key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS)
    )
    axes = _axes(figure, ROW * len(kinds) + 0.6)
    for stage in stages:
        x, y = layers.index(stage.layer), kinds.index(stage.kind)  # type: ignore[arg-type]
        used = min(max(strain(stage), PALEST), 1.0)
        opacity = 0.12 + 0.88 * (1 - math.log(used) / math.log(PALEST))
        tip, colour = f"{TIP}{stage.name}: {_error(stage)}", COLOURS[verdict_class(stage)]
        axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, color=colour, alpha=opacity, linewidth=0, gid=tip))
    axes.set(xlim=(-0.5, max(len(layers), 12) - 0.5), ylim=(len(kinds) - 0.5, -0.5))
    axes.set_xlabel("layer", loc="left")
    axes.set_yticks(range(len(kinds)), [kind_in_words(kind) for kind in kinds])
    _label(axes, range(len(layers)), layers)
    axes.grid(False)


def agreement(figure: Figure, stages: Sequence[StageResult]) -> None:
    """The share of equal choices, a bar for each mixture."""
    axes = _axes(figure, 2.2)
    for i, stage in enumerate(stages):
        assert stage.agreement is not None
        tip = f"{TIP}{stage.name}: {stage.agreement:.4%} of the choices are equal, {stage.num_flips} differ"
        axes.bar(i, stage.agreement, width=0.6, color=COLOURS[verdict_class(stage)], gid=tip)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _label_mixtures(axes, stages)


def margins(figure: Figure, stages: Sequence[StageResult]) -> None:
    """The closest choice of each mixture, those that flipped, and the margin that rounding explains."""
    axes = _axes(figure, 3.0)
    values = [
        value for stage in stages for value in (stage.closest or 0, stage.noise or 0, *(f.margin for f in stage.flips))
    ]
    place = _log_axis(axes, "y", values)
    for i, stage in enumerate(stages):
        assert stage.closest is not None and stage.noise is not None
        axes.hlines(place(stage.noise), i - 0.5, i + 0.5, color=COLOURS["allowed"], linestyle="--")
        _dot(
            axes, i, place(stage.closest), "same",
            f"{stage.name}: the closest choice has a margin of {stage.closest:.2g}",
        )
        for flip in stage.flips:
            chosen = f"JAX chose expert {flip.ours}, the reference {flip.theirs}"
            words = f"{list(flip.index)}: {chosen}, margin {flip.margin:.2g}"
            _dot(axes, i, place(flip.margin), "flip" if flip.near_tie else "wrong", words)
    _label_mixtures(axes, stages)


def gradients(figure: Figure, stages: Sequence[StageResult]) -> None:
    """The gradients with the largest errors, and the tolerance."""
    shown = sorted(stages, key=lambda stage: -stage.error)[:MOST_GRADIENTS]
    axes = _axes(figure, ROW * len(shown) + 0.6)
    place = _log_axis(axes, "x", [shown[0].tolerance, *(stage.error for stage in shown)])
    for i, stage in enumerate(shown):
        tip = f"{TIP}{stage.name}: {_error(stage)}"
        axes.barh(i, place(stage.error), height=0.6, color=COLOURS[verdict_class(stage)], gid=tip)
    axes.axvline(shown[0].tolerance, color=COLOURS["allowed"], linestyle="--")
    names = [stage.name.removeprefix("gradient of ") for stage in shown]
    axes.set_yticks(range(len(shown)), [name if len(name) <= 54 else f"...{name[-51:]}" for name in names])
    axes.set_ylim(len(shown) - 0.5, -0.5)


def verdict_class(stage: StageResult) -> str:
    """What a stage's verdict is called in the page's CSS."""
    return {"same": "same", "wrong number": "wrong"}.get(stage.verdict, "flip")


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole decades that hold all values, with an empty decade below them, and above if a value is infinite."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    return 10.0 ** (math.floor(min(logs)) - 1), 10.0 ** (math.floor(max(logs)) + 1 + (math.inf in values))


def _axes(figure: Figure, height: float) -> Axes:
    figure.set_size_inches(WIDTH, height)
    return figure.add_subplot()


def _log_axis(axes: Axes, letter: Literal["x", "y"], values: Sequence[float]) -> Callable[[float], float]:
    """Makes the axis logarithmic; returns where on it a value is drawn: 0 at its lower end, infinity at its upper."""
    low, high = decades(values)
    axes.set(**{f"{letter}scale": "log", f"{letter}lim": (low, high)})
    axis = axes.xaxis if letter == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    return lambda value: min(max(value, low), high)


def _dot(axes: Axes, x: int, y: float, style: str, tip: str) -> None:
    size = 4 if style == "same" else 6
    look: dict[str, Any] = {"marker": "o", "markersize": size, "color": COLOURS[style], "clip_on": False, "zorder": 3}
    axes.add_line(Line2D([x], [y], gid=f"{TIP}{tip}", **look))


def _label(axes: Axes, places: Sequence[int], words: Sequence[Any]) -> None:
    """Labels on the horizontal axis, as many as there is room for."""
    every = math.ceil(len(places) / MOST_LABELS)
    axes.set_xticks(places[::every], [str(word) for word in words[::every]])


def _label_mixtures(axes: Axes, stages: Sequence[StageResult]) -> None:
    _label(axes, range(len(stages)), ["" if stage.layer is None else f"layer {stage.layer}" for stage in stages])
    axes.set_xlim(-0.5, max(len(stages), 8) - 0.5)
    axes.grid(False, axis="x")


def _error(stage: StageResult) -> str:
    return f"{stage.error:.2g}, tolerance {stage.tolerance:.0e}"


RUN_COLOURS = {"float64": "#2b6cb0", "float32": "#c05621"}
HALF_ROUNDING = {"float64": 2.0**-54, "float32": 2.0**-25}  # where equal losses are drawn


def picture(runs: Sequence[Runs], title: str) -> Figure:
    """Two panels over the steps: both losses in the first dtype, and their relative difference in every dtype."""
    with matplotlib.rc_context(STYLE | {"font.size": 10, "text.color": "black", "axes.labelcolor": "black"}):
        figure = Figure(figsize=(8, 7), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    first = runs[0]
    above.plot(first.theirs.loss_S, color="#a0aec0", linewidth=4, label=f"PyTorch, {first.dtype}")
    above.plot(first.ours.loss_S, color=RUN_COLOURS[first.dtype], linewidth=1.2, label=f"JAX, {first.dtype}")
    above.set_ylabel("training loss, nats")
    above.set_title(title, loc="left")
    above.legend(frameon=False)
    for each in runs:
        _differences(below, each)
    below.set(yscale="log", ylabel="relative difference of the losses", xlabel="step")
    entries = below.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def _differences(axes: Axes, runs: Runs) -> None:
    colour, least = RUN_COLOURS[runs.dtype], HALF_ROUNDING[runs.dtype]
    both = f"JAX against PyTorch, {runs.dtype}"
    axes.plot(np.maximum(runs.drift_S, least), color=colour, linewidth=1.4, label=both)
    control = f"control: JAX, weights perturbed by {MOVED} rounding errors, {runs.dtype}"
    axes.plot(np.maximum(runs.control_S, least), ":", color=colour, linewidth=1.2, label=control)
    if runs.first_flip is not None:
        flip = f"first token that changes its expert, {runs.dtype}"
        axes.axvline(runs.first_flip, color=colour, linestyle="--", linewidth=0.8, label=flip)


def write_picture(path: Path, runs: Sequence[Runs], title: str) -> None:
    """Writes a PNG whole or not at all."""
    with writing(path, overwrite=True) as part:
        picture(runs, title).savefig(part, dpi=150, format="png")
