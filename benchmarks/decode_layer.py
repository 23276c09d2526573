"""One token for each of B sequences, as in a step of generation: which dispatcher, and how near to the memory's speed?

    python -m benchmarks.decode_layer [--batch 1 4 16 64] [--experts 8 64] [--rounds 15] [--json]

Times the forward of a dropless Mixtral layer (D=1024, F=512, K=2) for B tokens under `chosen`, `grouped` and `auto`,
and the reading of as many bytes as the weights of the experts that these tokens chose, in turn in one process; all must
agree. The bound is the time of the fastest of three ways to read them. Prints medians, the ratio of `chosen` to
`grouped`, whose change from below to above 1 is where to switch, and that of `auto` to the bound.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import begin, read_options
from benchmarks.contestant import TOLERANCE, difference
from benchmarks.layer_contestants import answer_of
from benchmarks.shapes import Numbers, Shape, weights_of
from benchmarks.timing import alternate, median_ratio
from jax_moe.config.checks import check_positive_ints

D, F, K = 1024, 512, 2
DISPATCHERS = ("chosen", "einsum", "grouped", "auto")
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Which sizes, and how often."""

    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of sequences."""
    experts: tuple[int, ...] = (8, 64, 128)
    """Numbers of experts."""
    rounds: int = 15
    """Timed calls of each."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)
        for name in ("batch", "experts"):
            for value in getattr(self, name):
                check_positive_ints(**{name: value})


def experts_touched(shape: Shape, numbers: Numbers) -> int:
    """How many experts the tokens choose."""
    _, expert_TK = jax.lax.top_k(numbers["x"] @ numbers["router"], shape.K)
    return np.unique(np.asarray(expert_TK)).size


def readers(rows: int, width: int) -> dict[str, Callable[[], object]]:
    """{way: reads an fp32 array of that shape once}."""
    numbers = jax.random.normal(jax.random.key(0, impl="rbg"), (rows, width))
    vector = jnp.ones(width)
    total, product, largest = jax.jit(jnp.sum), jax.jit(jnp.matmul), jax.jit(lambda x: x.max(axis=0))
    return {
        "reading, sum": lambda: jax.block_until_ready(total(numbers)),
        "reading, product": lambda: jax.block_until_ready(product(numbers, vector)),
        "reading, largest": lambda: jax.block_until_ready(largest(numbers)),
    }


def measure(shape: Shape, rounds: int) -> Row:
    """Medians in ms and their ratios. Raises ValueError if the dispatchers differ."""
    numbers = shape.numbers("float32")
    arguments = weights_of(numbers), numbers["x"]
    layers = {name: jax.jit(answer_of(shape, name)).lower(*arguments).compile() for name in DISPATCHERS}
    for name, run in layers.items():
        error, _ = difference({"answer": run(*arguments)}, {"answer": layers["grouped"](*arguments)})
        if not error <= TOLERANCE["float32"]:
            raise ValueError(f"the answer of {name} differs from grouped's by {error:.1e}")
    touched = experts_touched(shape, numbers)
    reading = readers(3 * touched * shape.F, shape.D)
    forward = {name: partial(_wait_for, run, arguments) for name, run in layers.items()}
    runs = forward | reading
    seconds = alternate(runs, rounds, warmup=2)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    fastest = min(reading, key=ms.__getitem__)
    return {
        "B": shape.T, "E": shape.E, "touched": touched, "ms": ms,
        "GB/s": 12 * touched * shape.D * shape.F / 1e6 / ms[fastest],
        "chosen / grouped": median_ratio(seconds, "chosen", "grouped"),
        "auto / bound": median_ratio(seconds, "auto", fastest),
    }


def _wait_for(run: Callable, arguments: tuple) -> None:
    jax.block_until_ready(run(*arguments))


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = read_options(Options, "benchmarks.decode_layer", __doc__, arguments)
    about = begin(None, "float32", asked.rounds)
    if not asked.json:
        print(f"{'E':>4}{'B':>4}{'experts read':>14}" + "".join(f"{name + ' ms':>12}" for name in DISPATCHERS)
              + f"{'chosen/grouped':>16}{'bound ms':>10}{'GB/s':>7}{'auto/bound':>12}")
    for E in asked.experts:
        for B in asked.batch:
            row = measure(Shape(B, D, F, E, min(K, E)), asked.rounds)
            about["results"].append(row)
            if not asked.json:
                bound = min(ms for name, ms in row["ms"].items() if name not in DISPATCHERS)
                times = "".join(f"{row['ms'][name]:12.2f}" for name in DISPATCHERS)
                print(f"{E:4}{B:4}{row['touched']:14}{times}{row['chosen / grouped']:16.2f}{bound:10.2f}"
                      f"{row['GB/s']:7.1f}{row['auto / bound']:12.2f}", flush=True)
    if asked.json:
        print(json.dumps(about, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
