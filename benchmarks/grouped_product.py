"""Which kernel is fastest for each of the three grouped products of a layer: forward, gradient of rows, of weights?

    python -m benchmarks.grouped_product [--shape T,D,F,E,K | NAME]... [--device gpu] [--dtype bfloat16]
                                         [--only NAME,NAME] [--rounds 7] [--save] [--results FOLDER]

T * K rows are sorted by expert, as many per expert as a router at initialisation sends. Each product is timed by
itself for both matrices of an expert, up (D to F) and down (F to D). Before that each kernel is compared with every
expert's own dense product on a small shape, also with half of the rows on one expert and three experts empty; a kernel
that differs is not timed. Prints TFLOP/s and the share of the rate of one large product of the same run; a line, and
with --save the JSON, as soon as it is measured. Exit status 1 if a kernel failed, 2 if jax has no such device.
"""

import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.command import begin, read_names, read_options
from benchmarks.contestant import difference
from benchmarks.layer_contestants import masked_dense, tokamax_product
from benchmarks.shapes import SHAPES, Shape, UnavailableError, draw, read_shape
from benchmarks.timing import RESULTS, alternate, new_file
from benchmarks.torch_contestants import finish_torch, from_torch, to_torch
from jax_moe.config.checks import check_positive_ints
from jax_moe.disk import write_whole
from jax_moe.kernels.devices import BLOCK, hopper_serves

Product = Callable[[Any, Any, Any], Any]
Products = dict[str, Product]
PRODUCTS = ("forward", "rows", "weights")
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}  # of the largest number; an answer in bfloat16 is rounded by 4e-3
SMALL = Shape(1024, 256, 512, 8, 2)


def by_gradient(grouped: Product) -> Products:
    """The three products of a differentiable `grouped(rows, weights, sizes)`; jit drops its unused forward."""

    def rows(g: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        x = jnp.zeros((g.shape[0], weights.shape[1]), g.dtype)
        return jax.vjp(lambda x: grouped(x, weights, sizes), x)[1](g)[0]

    def weights(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
        w = jnp.zeros((sizes.shape[0], x.shape[1], g.shape[1]), x.dtype)
        return jax.vjp(lambda w: grouped(x, w, sizes), w)[1](g)[0]

    return {"forward": grouped, "rows": rows, "weights": weights}


def torch_products() -> Products:
    """`grouped_mm` of torch, as transformers calls it; here sizes are the offsets at which experts end."""
    try:
        import torch
    except ImportError as missing:
        raise UnavailableError("torch is not installed") from missing
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        raise UnavailableError(f"torch {torch.__version__} has no grouped_mm")
    return {
        "forward": lambda x, w, ends: grouped(x, w, offs=ends), "rows": lambda g, w, ends: grouped(g, w.mT, offs=ends),
        "weights": lambda x, g, ends: grouped(x.mT, g, offs=ends),
    }


def hopper_products() -> Products:
    """Our kernels for Hopper GPUs; every expert has whole blocks here."""
    if not hopper_serves("bfloat16", BLOCK, BLOCK):
        raise UnavailableError("it runs on a single Hopper GPU")
    from jax_moe.kernels import hopper

    def of_rows(x: jax.Array, weight: jax.Array, sizes: jax.Array, transposed: bool) -> jax.Array:
        blocks = x.shape[0] // BLOCK
        expert_I = jnp.repeat(jnp.arange(sizes.shape[0], dtype=jnp.int32), sizes // BLOCK, total_repeat_length=blocks)
        return hopper.rows_product(x, weight, expert_I, transposed)

    def weights(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
        blocks_E = sizes // BLOCK
        return hopper.weights_product(x, g, (jnp.cumsum(blocks_E) - blocks_E).astype(jnp.int32), blocks_E)

    forward, rows = (partial(of_rows, transposed=transposed) for transposed in (False, True))
    return {"forward": forward, "rows": rows, "weights": weights}


# name -> () -> (forward(rows, weights, sizes), rows(gradient, weights, sizes), weights(rows, gradient, sizes))
KERNELS: dict[str, Callable[[], Products]] = {
    "hopper": hopper_products,
    "xla": lambda: by_gradient(jax.lax.ragged_dot),
    "tokamax triton": lambda: by_gradient(tokamax_product("triton")),
    "tokamax mosaic": lambda: by_gradient(tokamax_product("mosaic")),
    "torch grouped_mm": torch_products,
}


@dataclass(frozen=True)
class Options:
    """What to time, and where the results go."""

    shape: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="T,D,F,E,K")] = ()
    """Tokens, model width, expert width, experts, choices per token; or a name as in benchmarks.moe_layer."""
    device: Literal["cpu", "gpu", "tpu"] | None = None
    """By default what jax finds."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """By default bfloat16 on a GPU, else float32."""
    only: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME")] = None
    """Time these kernels."""
    rounds: int = 7
    """Timed calls of each product."""
    save: bool = False
    """Write <date>-<device>-grouped-product.json."""
    results: Path = RESULTS
    """The folder for --save."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)
        _ = [read_shape(text) for text in self.shape], read_names("only", self.only, KERNELS)


def group_sizes(rows: int, experts: int, uneven: bool = False) -> np.ndarray:
    """Rows of each expert, whole blocks where there are enough: multinomial; uneven: half of them on the first, one
    block or none on up to three others.
    """
    blocks = rows // BLOCK - experts
    if rows % BLOCK == 0 and blocks >= 0:
        return BLOCK * (1 + spread_out(blocks, experts, uneven))
    return spread_out(rows, experts, uneven)


def spread_out(rows: int, experts: int, uneven: bool) -> np.ndarray:
    """That many rows over the experts."""
    random = np.random.default_rng(0)
    if not uneven or experts < 3:
        return random.multinomial(rows, [1 / experts] * experts).astype(np.int32)
    share = np.ones(experts)
    share[: min(4, experts - 1)] = 0
    sizes = random.multinomial(rows - rows // 2, share / share.sum())
    sizes[0] = rows // 2
    return sizes.astype(np.int32)


def operands(side: str, product: str, shape: Shape, dtype: str) -> tuple[jax.Array, jax.Array]:
    """The two arrays that a product multiplies, on the device."""
    R, E, wide = shape.T * shape.K, shape.E, (shape.D, shape.F) if side == "up" else (shape.F, shape.D)
    sizes = {"rows": (R, wide[0]), "gradient": (R, wide[1]), "weights": (E, *wide)}
    names = {"forward": ("rows", "weights"), "rows": ("gradient", "weights"), "weights": ("rows", "gradient")}[product]
    first, second = (draw(key, sizes[name], dtype, 1.0) for key, name in zip(
        jax.random.split(jax.random.key(0, impl="rbg")), names, strict=True))
    return first, second


def reference(product: str, a: jax.Array, b: jax.Array, sizes: np.ndarray) -> jax.Array:
    """Every expert's own dense product in fp32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    ends, dot = np.cumsum(sizes), partial(jnp.matmul, precision="highest")
    spans = [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]
    if product == "weights":
        return jnp.stack([dot(a[span].T, b[span]) for span in spans])
    return jnp.concatenate([dot(a[span], b[e] if product == "forward" else b[e].T) for e, span in enumerate(spans)])


def prepare(kernel: str, product: Product, a: jax.Array, b: jax.Array, sizes: np.ndarray) -> tuple[Callable, Callable]:
    """(a call that waits for its answer, the same that returns it as an array of jax)."""
    if kernel.startswith("torch"):
        ends = to_torch(jnp.asarray(np.cumsum(sizes), jnp.int32))
        run = partial(product, to_torch(a), to_torch(b), ends)

        def call() -> None:
            run()
            finish_torch()

        return call, lambda: from_torch(run())
    counts = jnp.asarray(sizes)
    compiled = jax.jit(product).lower(a, b, counts).compile()
    return (lambda: jax.block_until_ready(compiled(a, b, counts))), lambda: compiled(a, b, counts)


def check(kernel: str, product: str, function: Product, dtype: str) -> str | None:
    """How the kernel differs from the reference on a small shape; None if it does not."""
    for side in ("up", "down"):
        a, b = operands(side, product, SMALL, dtype)
        for uneven in (False, True):
            sizes = group_sizes(SMALL.T * SMALL.K, SMALL.E, uneven)
            answer = prepare(kernel, function, a, b, sizes)[1]()
            error, _ = difference({"answer": answer}, {"answer": reference(product, a, b, sizes)})
            if not error <= TOLERANCE[dtype]:
                how = "uneven" if uneven else "usual"
                return f"differs from the reference by {error:.1e} with {how} sizes, {TOLERANCE[dtype]:.0e} allowed"
    return None


def guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, or why it could not."""
    try:
        return run()
    except UnavailableError as why:
        return {"left_out": str(why)}
    except Exception as error:  # whatever a kernel raises, the others are still timed
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"}


def measure(kernel: str, product: str, side: str, shape: Shape, dtype: str, rounds: int, rate: float) -> dict[str, Any]:
    """The median in ms, TFLOP/s and the share of `rate` of one product."""
    a, b = operands(side, product, shape, dtype)
    call, _ = prepare(kernel, KERNELS[kernel]()[product], a, b, group_sizes(shape.T * shape.K, shape.E))
    seconds = statistics.median(alternate({kernel: call}, rounds, warmup=2)[kernel])
    flops = 2 * shape.T * shape.K * shape.D * shape.F / seconds
    return {"ms": 1e3 * seconds, "tflops": flops / 1e12, "share_of_rate": flops / rate}


def hopeless(kernel: str, shape: Shape, dtype: str) -> str | None:
    """Why a kernel is not tried: XLA's masked copies [E, R, width] do not fit."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit") if jax.default_backend() == "gpu" else None
    needed = masked_dense(shape).numbers * jnp.dtype(dtype).itemsize if kernel == "xla" else 0
    return f"needs at least {needed / 2**30:.0f} GiB of {limit / 2**30:.0f}" if limit and needed > limit else None


def show(row: dict[str, Any]) -> None:
    """Prints a line."""
    what = f"{row['shape']:24}{row['side']:6}{row['product']:9}{row['kernel']:18}"
    if "ms" in row:
        print(f"{what}{row['ms']:10.2f} ms{row['tflops']:9.1f} TFLOP/s{row['share_of_rate']:7.0%}", flush=True)
    for kind in ("left_out", "failed"):
        if kind in row:
            print(f"{what}{kind.replace('_', ' ')}: {row[kind]}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = read_options(Options, "benchmarks.grouped_product", __doc__, arguments)
    about = begin(asked.device, asked.dtype, asked.rounds)
    dtype, rate = about["dtype"], about["product_rate"]
    path = new_file(about, asked.results, "-grouped-product") if asked.save else None
    print(f"{rate / 1e12:.2f} TFLOP/s in one {dtype} product\n{about['device'] | about['machine']}", flush=True)
    chosen = read_names("only", asked.only, KERNELS)
    kernels = [name for name in KERNELS if chosen is None or name in chosen]
    named = [shape for text in asked.shape for shape in read_shape(text)]
    verdicts: dict[tuple[str, str], dict[str, Any]] = {}
    with jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext():
        for shape in named or SHAPES["gpu" if jax.default_backend() == "gpu" else "cpu"]:
            for side, product, kernel in ((s, p, k) for s in ("up", "down") for p in PRODUCTS for k in kernels):
                row = {"shape": shape.name, "side": side, "product": product, "kernel": kernel}
                if (kernel, product) not in verdicts:
                    verdicts[kernel, product] = guarded(lambda: _verdict(kernel, product, dtype))  # noqa: B023
                row |= verdicts[kernel, product]
                if not verdicts[kernel, product]:
                    reason = hopeless(kernel, shape, dtype)
                    row |= {"left_out": reason} if reason else guarded(
                        partial(measure, kernel, product, side, shape, dtype, asked.rounds, rate))
                about["results"].append(row)
                show(row)
            if path:
                write_whole(path, json.dumps(about, indent=1) + "\n")
    if path:
        print(f"written: {path}", file=sys.stderr)
    return int(any("failed" in row for row in about["results"]))


def _verdict(kernel: str, product: str, dtype: str) -> dict[str, Any]:
    wrong = check(kernel, product, KERNELS[kernel]()[product], dtype)
    return {"failed": wrong} if wrong else {}


if __name__ == "__main__":
    sys.exit(main())
