"""How long does one dropless Mixtral layer take, against the dense limit and against peers?

    python -m benchmarks.moe_layer [--shape T,D,F,E,K | NAME]... [--dtype bfloat16] [--only NAME,NAME] [--rounds 7]
                                   [--plot OUT.png] [--json] [--save] [--results FOLDER]

The dense limit is one jitted SwiGLU FFN over K * T rows: the same active FLOPs without routing. Peers: the expert
implementations of `transformers` (eager and grouped_mm), plain `jax.lax.ragged_dot` and, where installed, `tokamax` and
`nano-moe-jax` (its layer under its own contract: GELU, biases). The command first checks that all contestants give the
same answers and the same gradients. Then it times forward alone and forward with backward, the contestants in turn, and
prints medians, ratios to the dense limit, and the share of the rate of one large matrix product of the same dtype,
measured in the same run. On a GPU the torch contestants run there too; this has not been run on a GPU yet. Exit status
1 if a contestant failed or disagreed.
"""

import contextlib
import datetime
import json
import os
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from benchmarks import layer_contestants
from benchmarks.command import read_names, read_options
from benchmarks.layer_contestants import DENSE, ENTRIES, TOLERANCE, Contestant, Shape, UnavailableError, Values
from benchmarks.timing import alternate, device, machine, median_ratio
from jax_moe.config.checks import check_positive_ints, require

SHAPES = {
    "cpu": [Shape(2048, 512, 1792, 8, 2), Shape(2048, 512, 256, 64, 8), Shape(8192, 256, 128, 128, 8)],
    "mixtral-8x7b": [Shape(T, 4096, 14336, 8, 2) for T in (8192, 32768)],
    "fine-grained": [Shape(T, 2048, 768, 128, 8) for T in (8192, 32768)],
}
RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to time, and where the results go."""

    shape: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="T,D,F,E,K")] = ()
    """Tokens, model width, expert width, experts, choices per token; or a name: cpu (the default: three shapes),
    mixtral-8x7b, fine-grained."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and tokens; the router stays float32."""
    only: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME")] = None
    """Time these contestants, and the dense limit, which always runs."""
    rounds: int = 7
    """Timed calls of each contestant."""
    plot: Path | None = None
    """Draw time against E and T into this PNG instead."""
    json: bool = False
    """Print JSON instead of tables."""
    save: bool = False
    """Also write the JSON as <date>-<device>.json."""
    results: Path = RESULTS
    """The folder for --save."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)
        _ = self.shapes, self.names  # raises ValueError if they cannot be read
        folder = self.plot is None or self.plot.absolute().parent.is_dir()
        require(folder, "plot", str(self.plot), "in a folder that exists")

    @property
    def shapes(self) -> list[Shape]:
        """The shapes to time."""
        return [shape for text in self.shape or ("cpu",) for shape in read_shape(text)]

    @property
    def names(self) -> set[str] | None:
        """The contestants to time; None for all that can run here."""
        return read_names("only", self.only, ENTRIES)


def read_shape(text: str) -> list[Shape]:
    """The shapes that `T,D,F,E,K` or a name stands for. Raises ValueError if it is neither."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split(",")
    whole = len(sizes) == 5 and all(size.isdecimal() and int(size) for size in sizes)
    require(whole, "shape", text, f"T,D,F,E,K, five integers of at least 1, or one of {', '.join(SHAPES)}")
    shape = Shape(*map(int, sizes))
    require(shape.K <= shape.E, "shape", text, f"of K={shape.K} at most E={shape.E}")
    return [shape]


def product_rate(dtype: str, side: int) -> float:
    """FLOPs a second of the product of two square matrices, the fastest of ten."""
    square = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    product = jax.jit(jnp.matmul)
    seconds = alternate({"product": lambda: jax.block_until_ready(product(square, square))}, rounds=10, warmup=2)
    return 2 * side**3 / min(seconds["product"])


def entrants(shape: Shape, dtype: str, only: set[str] | None) -> tuple[dict[str, Contestant], Result]:
    """(contestants that run here and agree, {name: its difference, or why it does not take part}).

    Each is compared with the first contestant of its contract.
    """
    numbers = shape.numbers(dtype)
    chosen: dict[str, Contestant] = {}
    notes: Result = {}
    first: dict[str, tuple[str, Values]] = {}
    for name in layer_contestants.names(only):
        contract = ENTRIES[name].contract
        try:
            layer_contestants.available(name)
            contestant = ENTRIES[name].make(shape, numbers)
            if contestant.values is None:
                contestant.both()
            else:
                base, expected = first.setdefault(contract, (name, contestant.values()))
                error, where = layer_contestants.difference(contestant.values() if base != name else expected, expected)
                if not error <= TOLERANCE[dtype]:
                    allowed = f"{TOLERANCE[dtype]:.0e} allowed"
                    notes[name] = {"failed": f"{where} differs from {base} by {error:.1e}, {allowed}"}
                    continue
                notes[name] = {"difference": error}
        except UnavailableError as why:
            notes[name] = {"left_out": str(why)}
            continue
        except Exception as error:  # whatever a peer raises, the other contestants are still timed
            notes[name] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"}
            continue
        chosen[name] = contestant
    return chosen, notes


def measure(shape: Shape, dtype: str, rounds: int, only: set[str] | None, rate: float) -> Result:
    """Medians in ms, ratios to the dense limit, and shares of `rate`, the FLOPs a second of a large product."""
    result: Result = {"shape": shape.name, "dtype": dtype}
    # on a GPU jax would otherwise multiply float32 in TF32, which torch does not
    with jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext():
        chosen, result["notes"] = entrants(shape, dtype, only)
        for kind in ("forward", "both"):
            runs = {name: getattr(contestant, kind) for name, contestant in chosen.items()}
            seconds = alternate(runs, rounds, warmup=2)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            result[kind] = {
                name: {"ms": 1e3 * median, "ratio": median_ratio(seconds, name, DENSE) if DENSE in seconds else None,
                       "share_of_rate": _flops(shape, name, kind) / median / rate}
                for name, median in medians.items()
            }
    return result


def _flops(shape: Shape, name: str, kind: str) -> float:
    """Active FLOPs. Experts without a gate have two products instead of three."""
    return shape.flops(kind) * (2 / 3 if ENTRIES[name].contract == "nano" else 1)


def show(result: Result) -> None:
    """Prints the table."""
    print(f"\nT,D,F,E,K = {result['shape']}, {result['dtype']}")
    beside = f"{'/ dense':>9}{'of rate':>9}"
    print(f"{'':26}{'forward':>12}{beside}{'with backward':>16}{beside}{'differs by':>12}")
    for name in result["forward"]:
        row = f"{name:26}"
        for kind, width in (("forward", 9), ("both", 13)):
            cell = result[kind][name]
            ratio = "-" if cell["ratio"] is None else f"{cell['ratio']:.2f}"
            row += f"{cell['ms']:{width}.1f} ms{ratio:>9}{cell['share_of_rate']:9.0%}"
        error = result["notes"].get(name, {}).get("difference")
        print(row + (f"{error:12.1e}" if error else ""))
    for name, note in result["notes"].items():
        for what in ("left_out", "failed"):
            if what in note:
                print(f"{name:26}{what.replace('_', ' ')}: {note[what]}")


def draw(dtype: str, rounds: int, only: set[str] | None, rate: float, out: Path) -> list[Result]:
    """Draws time against E at equal active FLOPs, and against T; the results drawn."""
    from matplotlib.figure import Figure

    from train.plots import save

    sweeps = {
        "experts E (T=2048, D=256, F=128, K=8)": [Shape(2048, 256, 128, E, 8) for E in (8, 16, 32, 64, 128)],
        "tokens T (D=256, F=128, E=64, K=8)": [Shape(T, 256, 128, 64, 8) for T in (512, 1024, 2048, 4096, 8192)],
    }
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    results = []
    for axis, (label, shapes) in zip(axes, sweeps.items(), strict=True):
        points = [measure(shape, dtype, rounds, only, rate) for shape in shapes]
        results += points
        across = [shape.E if label.startswith("experts") else shape.T for shape in shapes]
        for name in layer_contestants.names(only):
            timed = [(x, point["both"]) for x, point in zip(across, points, strict=True) if name in point["both"]]
            if timed:
                ms = [cells[name]["ms"] for _, cells in timed]
                axis.plot([x for x, _ in timed], ms, marker="o", markersize=4, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks(across, [str(x) for x in across], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward and backward, ms")
    axes[1].legend(fontsize=8)
    save(figure, out)
    return results


def keep(about: Result, folder: Path) -> Path:
    """Writes `<date>-<device>.json`, with a number if that name is taken; the path."""
    from train.run.whole import write_whole

    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", about["device"]["device"].lower()).strip("-")
    stem, number = f"{about['date'][:10]}-{device}", 1
    while (path := folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")).exists():
        number += 1
    write_whole(path, json.dumps(about, indent=1) + "\n")
    return path


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = read_options(Options, "benchmarks.moe_layer", __doc__, arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # jax and torch share one GPU
    rate = product_rate(asked.dtype, 2048 if jax.default_backend() == "cpu" else 8192)
    about: Result = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "device": device(),
        "machine": machine(), "rounds": asked.rounds, "product_rate": rate, "results": [],
    }
    if asked.plot:
        about["results"] = draw(asked.dtype, asked.rounds, asked.names, rate, asked.plot)
    for shape in [] if asked.plot else asked.shapes:
        about["results"].append(measure(shape, asked.dtype, asked.rounds, asked.names, rate))
        if not asked.json:
            show(about["results"][-1])
        sys.stdout.flush()
    if asked.json:
        print(json.dumps(about, indent=1))
    else:
        print(f"\n{rate / 1e9:.0f} GFLOP/s in one {asked.dtype} product\n{about['device'] | about['machine']}")
    if asked.save:
        print(f"written: {keep(about, asked.results)}", file=sys.stderr)
    return int(any("failed" in note for result in about["results"] for note in result["notes"].values()))


if __name__ == "__main__":
    sys.exit(main())
