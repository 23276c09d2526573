"""The picture of a compared training run: both loss curves, and how far apart they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jax_moe.disk import writing
from moe_parity.training.runs import MOVED, Runs

COLOURS = {"float64": "#2b6cb0", "float32": "#c05621"}
LEAST = {"float64": 2.0**-54, "float32": 2.0**-25}  # equal is drawn at half a rounding


def picture(runs: Sequence[Runs], title: str) -> Figure:
    """Two panels over the steps: the losses (both frameworks, fp64), and the relative difference in every dtype."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
    one = runs[0]
    step = np.arange(len(one.drift_S))
    above.plot(step, one.theirs.loss_S, color="#a0aec0", linewidth=4, label=f"PyTorch, {one.dtype}")
    above.plot(step, one.ours.loss_S, color=COLOURS[one.dtype], linewidth=1.2, label=f"JAX, {one.dtype}")
    above.set_ylabel("training loss, nats")
    above.set_title(title, loc="left")
    above.legend(frameon=False)
    for each in runs:
        _differences(below, each, step)
    below.set_yscale("log")
    below.set_ylabel("relative difference of the losses")
    below.set_xlabel("step")
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def _differences(axes: Any, runs: Runs, step: np.ndarray) -> None:
    colour = COLOURS[runs.dtype]
    both, least = f"JAX against PyTorch, {runs.dtype}", LEAST[runs.dtype]
    axes.plot(step, np.maximum(runs.drift_S, least), color=colour, linewidth=1.4, label=both)
    own = f"JAX against itself, weights moved by {MOVED} roundings, {runs.dtype}"
    axes.plot(step, np.maximum(runs.control_S, least), ":", color=colour, linewidth=1.2, label=own)
    if runs.first_flip is not None:
        flip = f"a token changes its expert, {runs.dtype}"
        axes.axvline(runs.first_flip, color=colour, linestyle="--", linewidth=0.8, label=flip)


def write_picture(path: Path, runs: Sequence[Runs], title: str) -> None:
    """Writes a PNG whole or not at all."""
    with writing(path, overwrite=True) as part:
        picture(runs, title).savefig(part, dpi=150, format="png")
