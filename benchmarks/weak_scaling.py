"""How does a training step grow from 8 to 256 TPU chips, with one sequence for each chip? From the TPU compiler.

    python -m benchmarks.weak_scaling [--results FILE] [--plot docs/weak_scaling.png]

Reads what `benchmarks.tpu_train --json` printed for one model on meshes that differ in their data axis alone. Prints
for each number of chips the model FLOPs, the memory, and the bytes that a chip sends, beside those in theory: what it
sends with one device on the data axis, and (n - 1) / n of `WIRE` bytes for each number that such a device holds. With n
devices on the data axis its weights are gathered forward and backward in bf16, and their gradients reduced.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType

from benchmarks.command import read_options
from benchmarks.timing import RESULTS
from benchmarks.tpu_train import Options as Step
from benchmarks.tpu_train import contract
from jax_moe.config.checks import require
from jax_moe.parameters import declared
from jax_moe.porting.state_dict import abstract_decoder
from jax_moe.sharding.memory import numbers_on_device
from jax_moe.sharding.mesh import AXES, read_mesh
from moe_cli.sizes import GIB

WIRE = 6  # bytes of a number: bf16 in each of two gathers and in one reduction
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is read and drawn."""

    results: Path = RESULTS / "2026-11-28-tpu-train.json"
    """A list of what `benchmarks.tpu_train --json` printed."""
    model: str = "mixtral-8x7b"
    """The model whose steps are compared."""
    layers: int = 4
    """Its number of layers."""
    plot: Path | None = None
    """Draw the bytes in this file too."""

    def __post_init__(self) -> None:
        require(self.results.is_file(), "results", str(self.results), "a file that exists")


def steps(options: Options) -> list[Row]:
    """The steps of the model with so many layers, by the number of chips. Raises ValueError without two of them."""
    found = [
        row for row in json.loads(options.results.read_text())
        if (row["options"]["train"], row["options"]["layers"]) == (options.model, options.layers)
    ]
    require(len(found) > 1, "model", options.model, f"one of which {options.results} has several steps of that depth")
    return sorted(found, key=lambda row: data_devices(row))


def data_devices(row: Row) -> int:
    """How many devices the data axis has."""
    return read_mesh(row["options"]["mesh"]).get("data", 1)


def numbers_of_chip(row: Row) -> int:
    """The weights' numbers that a chip would hold with one device on the data axis."""
    sizes = read_mesh(row["options"]["mesh"]) | {"data": 1}
    mesh = jax.sharding.AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )
    asked = {name: value for name, value in row["options"].items() if name != "json"}
    return sum(numbers_on_device(mesh, declared(abstract_decoder(contract(Step(**asked))))).values())


def in_theory(first: Row, row: Row) -> float:
    """The bytes that a chip sends in theory, from those of the first row."""
    one = sum(first["sent"].values()) - WIRE * numbers_of_chip(first) * _share(data_devices(first))
    return one + WIRE * numbers_of_chip(row) * _share(data_devices(row))


def _share(devices: int) -> float:
    return (devices - 1) / devices


def draw(rows: list[Row], out: Path) -> None:
    """Bars of the bytes by kind, and the theory."""
    from matplotlib.figure import Figure

    from moe_train.plots import save

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    chips = [str(chips_of(row)) for row in rows]
    below = [0.0] * len(rows)
    for kind in KINDS:
        sizes = [row["sent"].get(kind, 0) / GIB for row in rows]
        if any(sizes):
            axes.bar(chips, sizes, 0.55, bottom=below, label=kind)
            below = [a + b for a, b in zip(below, sizes, strict=True)]
    theory = [in_theory(rows[0], row) / GIB for row in rows]
    axes.plot(chips, theory, "k_", markersize=60, markeredgewidth=2, label="theory")
    axes.set(xlabel="chips, one sequence of 4096 tokens each", ylabel="GiB that a chip sends in a step")
    axes.set_title(f"{rows[0]['options']['train']}, {rows[0]['options']['layers']} layers (TPU compiler's estimate)")
    axes.legend(frameon=False, labelspacing=0.4, handlelength=1.2, markerscale=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, out)


def chips_of(row: Row) -> int:
    """The number of chips."""
    return Step(**{name: value for name, value in row["options"].items() if name != "json"}).chips


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = read_options(Options, "benchmarks.weak_scaling", __doc__, arguments)
    try:
        rows = steps(asked)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'chips':>6}{'FLOPs of a chip':>17}{'memory, GiB':>13}{'sent, GiB':>11}{'in theory':>11}{'cycles':>10}")
    for row in rows:
        memory = (row["memory"]["state"] + row["memory"]["temporary"]) / GIB
        sent, theory = sum(row["sent"].values()) / GIB, in_theory(rows[0], row) / GIB
        print(f"{chips_of(row):6}{row['flops']:17.4g}{memory:13.1f}{sent:11.2f}{theory:11.2f}{row['cycles']:10.3g}")
    if asked.plot is not None:
        draw(rows, asked.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
