"""Plots of a run: loss curves, and the load of every expert over time. As a command, it plots several runs together."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jax_moe.disk import whole
from jax_moe.process import any_encoding
from moe_train.run import metrics

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")


def _axes_style(axes: object) -> None:
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]
    axes.grid(True, color="#e2e8f0", linewidth=0.8)  # type: ignore[attr-defined]
    axes.set_axisbelow(True)  # type: ignore[attr-defined]


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file whole or not at all."""
    with whole(path) as part:
        figure.savefig(part, dpi=150, format="png")


def loss_figure(runs: dict[str, Sequence[metrics.Row]]) -> Figure:
    """Training (thin, dashed) and validation (solid) loss by step, one colour per run."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    _axes_style(axes)
    for number, (name, rows) in enumerate(runs.items()):
        colour, prefix = COLOURS[number % len(COLOURS)], f"{name}: " if len(runs) > 1 else ""
        step = [row["step"] for row in rows]
        train, val = ([row[key] for row in rows] for key in ("train_loss", "val_loss"))
        marker = "o" if len(rows) == 1 else None  # a line through one point is invisible
        axes.plot(step, train, "--", color=colour, linewidth=1.2, alpha=0.8, label=f"{prefix}train", marker=marker)
        label = f"{prefix}validation, {val[-1]:.3f} at the end"
        axes.plot(step, val, color=colour, linewidth=1.8, marker=marker, label=label)
    # without the loss before the first step, which is far above the rest
    later = [row[key] for rows in runs.values() for row in rows[1:] for key in ("train_loss", "val_loss")]
    if later:
        low, high = min(later), max(later)
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.15 * (high - low + 0.1))
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy, nats per token")
    axes.legend(frameon=False)
    return figure


def load_figure(rows: Sequence[metrics.Row]) -> Figure:
    """Each expert's share of the choices, times the number of experts (1 is balanced), over time, by layer."""
    load_RLE = np.array([row["expert_load"] for row in rows])
    L, E = load_RLE.shape[1:]
    step = np.array([row["step"] for row in rows])
    columns = min(4, L)
    lines = math.ceil(L / columns)
    figure = Figure(figsize=(2.6 * columns + 1.2, 2.0 * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for layer, axes in enumerate(grid.flat):
        if layer >= L:
            axes.set_visible(False)
            continue
        logs_ER = np.log2(np.maximum(load_RLE[:, layer].T * E, 1e-6))
        image = axes.pcolormesh(step, np.arange(E), logs_ER, cmap="RdBu_r", vmin=-2, vmax=2, shading="nearest")
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_yticks(range(0, E, max(1, E // 8)))
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(image, ax=grid, ticks=[-2, -1, 0, 1, 2], extend="both", shrink=0.9)
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("load, times the balanced share")
    return figure


def plot_run(folder: Path, rows: Sequence[metrics.Row]) -> None:
    """Writes loss.png and expert_load.png."""
    save(loss_figure({folder.name: rows}), folder / "loss.png")
    save(load_figure(rows), folder / "expert_load.png")


@dataclass(frozen=True)
class Plots:
    """Plots the loss curves of several runs together."""

    compare: tuple[Path, ...]
    """Run folders, then the PNG to write."""


def main() -> int:
    """`python train/plots.py --compare RUN_A RUN_B OUT.png`."""
    import tyro

    any_encoding()
    folders = tyro.cli(Plots, prog="plots.py").compare
    try:
        if len(folders) < 2 or folders[-1].suffix != ".png":
            raise ValueError("compare: must be run folders followed by a file that ends in .png")
        runs: dict[str, Sequence[metrics.Row]] = {str(folder): metrics.read(folder) for folder in folders[:-1]}
        empty = [name for name, rows in runs.items() if not rows]
        if empty:
            raise ValueError(f"compare: must be runs with at least one evaluation; {empty[0]} has none yet")
        save(loss_figure(runs), folders[-1])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

