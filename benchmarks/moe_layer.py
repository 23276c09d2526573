"""How long does one dropless Mixtral layer take, against the dense limit and against peers?

    python -m benchmarks.moe_layer [--shape T,D,F,E,K | NAME]... [--device gpu] [--dtype bfloat16] [--only NAME,NAME]
                                   [--rounds 7] [--plot OUT.png] [--json] [--save] [--results FOLDER]

The dense limit is one jitted SwiGLU FFN over K * T rows: the same active FLOPs without routing. Peers: the expert
implementations of `transformers` (eager and grouped_mm), plain `jax.lax.ragged_dot` and, where installed, `tokamax` and
`nano-moe-jax` (its layer under its own contract: GELU, biases). The command first checks that all contestants give the
same answers and the same gradients. Then it times forward alone and forward with backward, the contestants in turn, and
prints medians, ratios to the dense limit, and the share of the rate of one large matrix product of the same dtype,
measured in the same run. Peak memory is that of one forward with backward, weights and gradients included: of jax what
the compiler plans, of torch what its allocator handed out. On a GPU the torch contestants run there too; bfloat16 and
the shapes `gpu` are the defaults there. XLA_FLAGS are recorded. Every shape is printed, and with --save written, when
it is measured. Exit status 1 if a contestant failed or disagreed, 2 if jax has no such device.
"""

import contextlib
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from benchmarks import layer_contestants
from benchmarks.command import begin, read_names, read_options
from benchmarks.contestant import TOLERANCE, Contestant, Values, difference
from benchmarks.layer_contestants import DENSE, ENTRIES
from benchmarks.shapes import SHAPES, Shape, UnavailableError, read_shape
from benchmarks.timing import RESULTS, alternate, median_ratio, new_file
from jax_moe.config.checks import check_positive_ints, require
from jax_moe.disk import write_whole

Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to time, and where the results go."""

    shape: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="T,D,F,E,K")] = ()
    """Tokens, model width, expert width, experts, choices per token; or a name: cpu (the default: three shapes),
    mixtral-8x7b, qwen3-30b, fine-grained, gpu (the default on a GPU: these five)."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """By default what jax finds."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and tokens; the router stays float32. By default bfloat16 on a GPU, else float32."""
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
        """The shapes to time; none for the default."""
        return [shape for text in self.shape for shape in read_shape(text)]

    @property
    def names(self) -> set[str] | None:
        """The contestants to time; None for all that can run here."""
        return read_names("only", self.only, ENTRIES)


def entrants(
    shape: Shape, dtype: str, only: set[str] | None, rate: float | None = None
) -> tuple[dict[str, Contestant], Result]:
    """(contestants that run here and agree, {name: its difference, or why it does not take part}).

    Each is compared with the first contestant of its contract.
    """
    numbers = shape.numbers(dtype)
    chosen: dict[str, Contestant] = {}
    notes: Result = {}
    first: dict[str, tuple[str, Values]] = {}
    for name in layer_contestants.names(only):
        contract, start = ENTRIES[name].contract, time.perf_counter()
        try:
            layer_contestants.available(name, shape, dtype, rate)
            contestant = ENTRIES[name].make(shape, numbers)
            if contestant.values is None:
                contestant.both()
            else:
                base, expected = first.setdefault(contract, (name, contestant.values()))
                error, where = difference(contestant.values() if base != name else expected, expected)
                if not error <= TOLERANCE[dtype]:
                    allowed = f"{TOLERANCE[dtype]:.0e} allowed"
                    notes[name] = {"failed": f"{where} differs from {base} by {error:.1e}, {allowed}"}
                    continue
                notes[name] = {"difference": error}
            notes[name] = notes.get(name, {}) | {"peak": contestant.peak(), "ready_s": time.perf_counter() - start}
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
        chosen, result["notes"] = entrants(shape, dtype, only, rate)
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
    print(f"{'':26}{'forward':>12}{beside}{'with backward':>16}{beside}{'differs by':>12}{'peak GiB':>10}")
    for name in result["forward"]:
        row = f"{name:26}"
        for kind, width in (("forward", 9), ("both", 13)):
            cell = result[kind][name]
            ratio = "-" if cell["ratio"] is None else f"{cell['ratio']:.2f}"
            row += f"{cell['ms']:{width}.1f} ms{ratio:>9}{cell['share_of_rate']:9.0%}"
        note = result["notes"].get(name, {})
        error = f"{note['difference']:.1e}" if note.get("difference") else ""
        peak = f"{note['peak'] / 2**30:.2f}" if note.get("peak") else "-"
        print(f"{row}{error:>12}{peak:>10}")
    for name, note in result["notes"].items():
        for what in ("left_out", "failed"):
            if what in note:
                print(f"{name:26}{what.replace('_', ' ')}: {note[what]}")


def draw(dtype: str, rounds: int, only: set[str] | None, rate: float, out: Path) -> list[Result]:
    """Draws time against E at equal active FLOPs, and against T; the results drawn."""
    from matplotlib.figure import Figure

    from moe_train.plots import save

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


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = read_options(Options, "benchmarks.moe_layer", __doc__, arguments)
    about = begin(asked.device, asked.dtype, asked.rounds)
    dtype, rate = about["dtype"], about["product_rate"]
    path = new_file(about, asked.results) if asked.save else None
    if not asked.json:
        print(f"{rate / 1e9:.0f} GFLOP/s in one {dtype} product\n{about['device'] | about['machine']}", flush=True)
    if asked.plot:
        about["results"] = draw(dtype, asked.rounds, asked.names, rate, asked.plot)
    for shape in [] if asked.plot else asked.shapes or SHAPES["gpu" if jax.default_backend() == "gpu" else "cpu"]:
        about["results"].append(measure(shape, dtype, asked.rounds, asked.names, rate))
        if not asked.json:
            show(about["results"][-1])
            sys.stdout.flush()
        if path:
            write_whole(path, json.dumps(about, indent=1) + "\n")
    if asked.json:
        print(json.dumps(about, indent=1))
    if path:
        write_whole(path, json.dumps(about, indent=1) + "\n")
        print(f"written: {path}", file=sys.stderr)
    return int(any("failed" in note for result in about["results"] for note in result["notes"].values()))


if __name__ == "__main__":
    sys.exit(main())
