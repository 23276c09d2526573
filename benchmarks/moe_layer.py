"""How long does one dropless Mixtral layer take, against the dense limit and against peers?

    python -m benchmarks.moe_layer [--shape T,D,F,E,K | NAME]... [--dtype bfloat16] [--only NAME,NAME] [--rounds 7]
                                   [--plot OUT.png] [--json] [--save]

The dense limit is one jitted SwiGLU FFN over K * T rows: the same active FLOPs without any routing. Peers: the experts
implementations of `transformers` (eager and grouped_mm), raw `jax.lax.ragged_dot` and, where installed, `tokamax` and
`nano-moe-jax` (its layer under its own contract: GELU, biases). Checks first that all give the same answers and the same
gradients; then times forward alone and forward with backward in turn, and prints medians, ratios to the dense limit, and
the share of the rate of one large matrix product of the same dtype, measured in the same run. On a GPU the torch
contestants run there too; it has not been run on one yet. Exit status 1 if a contestant failed or disagreed.
"""

import contextlib
import datetime
import json
import os
import re
import statistics
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import layer_contestants as field
from benchmarks.layer_contestants import DENSE, ENTRIES, TOLERANCE, Contestant, Shape, UnavailableError, Values
from benchmarks.timing import Parser, alternate, device, machine, median_ratio, one_of, positive

SHAPES = {
    "cpu": [Shape(2048, 512, 1792, 8, 2), Shape(2048, 512, 256, 64, 8), Shape(8192, 256, 128, 128, 8)],
    "mixtral-8x7b": [Shape(T, 4096, 14336, 8, 2) for T in (8192, 32768)],
    "fine-grained": [Shape(T, 2048, 768, 128, 8) for T in (8192, 32768)],
}
RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]


def read_shape(text: str) -> list[Shape]:
    """The shapes of one `--shape`."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split(",")
    if len(sizes) != 5 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ArgumentTypeError(f"{text!r}: must be T,D,F,E,K, five integers of at least 1, or of {', '.join(SHAPES)}")
    shape = Shape(*map(int, sizes))
    if shape.K > shape.E:
        raise ArgumentTypeError(f"{text!r}: K={shape.K} must be at most E={shape.E}")
    return [shape]


def product_rate(dtype: str, side: int) -> float:
    """FLOPs a second of the device's best product of two square matrices."""
    square = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    product = jax.jit(jnp.matmul)
    seconds = alternate({"product": lambda: jax.block_until_ready(product(square, square))}, rounds=10, warmup=2)
    return 2 * side**3 / min(seconds["product"])


def entrants(shape: Shape, dtype: str, only: set[str] | None) -> tuple[dict[str, Contestant], Result]:
    """(all that run here and agree, how far each is from the first of its contract or why it is left out)."""
    numbers = shape.numbers(dtype)
    chosen: dict[str, Contestant] = {}
    notes: Result = {}
    first: dict[str, tuple[str, Values]] = {}
    for name in field.names(only):
        contract = ENTRIES[name].contract
        try:
            field.available(name)
            one = ENTRIES[name].make(shape, numbers)
            if one.values is None:
                one.both()
            else:
                base, expected = first.setdefault(contract, (name, one.values()))
                error, where = field.difference(one.values() if base != name else expected, expected)
                if not error <= TOLERANCE[dtype]:
                    notes[name] = {"failed": f"{where} differs from {base} by {error:.1e}, {TOLERANCE[dtype]:.0e} allowed"}
                    continue
                notes[name] = {"difference": error}
        except UnavailableError as why:
            notes[name] = {"left_out": str(why)}
            continue
        except Exception as error:  # whatever a peer raises, the others can still be timed
            notes[name] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"}
            continue
        chosen[name] = one
    return chosen, notes


def measure(shape: Shape, dtype: str, rounds: int, only: set[str] | None, rate: float) -> Result:
    """Medians in ms, ratios to the dense limit and shares of `rate`."""
    result: Result = {"shape": shape.name, "dtype": dtype}
    # "highest": jax would otherwise multiply float32 in fewer bits on a GPU, which torch does not
    with jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext():
        chosen, result["notes"] = entrants(shape, dtype, only)
        for kind in ("forward", "both"):
            seconds = alternate({name: getattr(one, kind) for name, one in chosen.items()}, rounds, warmup=2)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            result[kind] = {
                name: {"ms": 1e3 * median, "ratio": median_ratio(seconds, name, DENSE) if DENSE in seconds else None,
                       "share_of_rate": _flops(shape, name, kind) / median / rate}
                for name, median in medians.items()
            }
    return result


def _flops(shape: Shape, name: str, kind: str) -> float:
    """Active ones; experts without a gate have two products where the others have three."""
    return shape.flops(kind) * (2 / 3 if ENTRIES[name].contract == "nano" else 1)


def show(result: Result) -> None:
    """The table."""
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
    """Time against E at equal active FLOPs, and against T; the figure and its numbers."""
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
        for name in field.names(only):
            there = [(x, point["both"][name]["ms"]) for x, point in zip(across, points, strict=True) if name in point["both"]]
            if there:
                axis.plot(*zip(*there, strict=True), marker="o", markersize=4, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks(across, [str(x) for x in across], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward and backward, ms")
    axes[1].legend(fontsize=8)
    save(figure, out)
    return results


def keep(about: Result, folder: Path) -> Path:
    """Writes `<date>-<device>.json`, or with a number where that is taken; the path."""
    from train.run.metrics import write_whole

    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", about["device"]["device"].lower()).strip("-")
    stem, number = f"{about['date'][:10]}-{device}", 1
    while (path := folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")).exists():
        number += 1
    write_whole(path, json.dumps(about, indent=1) + "\n")
    return path


def parser() -> Parser:
    """The command's options."""
    parser = Parser("benchmarks.moe_layer", __doc__)
    parser.add_argument("--shape", action="extend", type=read_shape, metavar="T,D,F,E,K",
                        help=f"five sizes, or a name ({', '.join(SHAPES)}); again for more; default cpu, three shapes")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of weights and tokens; the router stays float32")
    parser.add_argument("--only", type=one_of(ENTRIES), metavar="NAMES",
                        help=f"contestants by commas, besides the dense limit, which always runs: {', '.join(ENTRIES)}")
    parser.add_argument("--rounds", type=positive, default=7, help="timed calls of each (default 7)")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw time against E and T instead")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--save", type=Path, nargs="?", const=RESULTS, metavar="FOLDER",
                        help="also write the JSON as <date>-<device>.json (default benchmarks/results)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = parser().parse_args(arguments)
    if asked.plot and not asked.plot.absolute().parent.is_dir():
        parser().error(f"--plot {asked.plot}: there is no folder {asked.plot.parent}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # jax and torch share one GPU
    rate = product_rate(asked.dtype, 2048 if jax.default_backend() == "cpu" else 8192)
    about: Result = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "device": device(), "machine": machine(),
        "rounds": asked.rounds, "product_rate": rate, "results": [],
    }
    if asked.plot:
        about["results"] = draw(asked.dtype, asked.rounds, asked.only, rate, asked.plot)
    for shape in [] if asked.plot else asked.shape or SHAPES["cpu"]:
        about["results"].append(measure(shape, asked.dtype, asked.rounds, asked.only, rate))
        if not asked.json:
            show(about["results"][-1])
        sys.stdout.flush()
    if asked.json:
        print(json.dumps(about, indent=1))
    else:
        print(f"\n{rate / 1e9:.0f} GFLOP/s in one {asked.dtype} product\n{about['device'] | about['machine']}")
    if asked.save:
        print(f"written: {keep(about, asked.save)}", file=sys.stderr)
    return int(any("failed" in note for result in about["results"] for note in result["notes"].values()))


if __name__ == "__main__":
    sys.exit(main())
