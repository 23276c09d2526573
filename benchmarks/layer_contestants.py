"""The contestants of `benchmarks.moe_layer`: our layer under its dispatchers, the dense limit and the peers.

All start from the same numbers in the same dtype. All but the dense limit return their answer and gradients, so that
they are compared before they are timed, on the device where they are. The contestants of jax share the weights' arrays;
`transformers` has a second copy, laid out as it wants.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jax_moe
from benchmarks.contestant import Contestant, jitted
from benchmarks.shapes import Numbers, Shape, UnavailableError, weights_of
from benchmarks.torch_contestants import transformers_block
from jax_moe.kernels.devices import hopper_serves

TRITON = "jax_ragged_dot_use_gpu_pallas_triton_lowering"  # a setting of jax 0.10 and 0.11, gone in 0.12
LONGEST = 2.0  # seconds of a forward with backward at the rate of a large product; more is hopeless on an accelerator


def answer_of(shape: Shape, dispatcher: str) -> Callable[[dict, jax.Array], jax.Array]:
    """(weights, x) -> the answer of our layer with this dispatcher."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: jax_moe.MoE(shape.config(dispatcher))))

    def answer(weights: dict, x: jax.Array) -> jax.Array:
        experts = {name: weights[name] for name in ("gate", "up", "down")}
        params = {"router": {"kernel": weights["router"]}, "experts": experts}
        return nnx.merge(graphdef, params)(x[None])[0][0]

    return answer


def layer(shape: Shape, numbers: Numbers, dispatcher: str) -> Contestant:
    """Our layer with this dispatcher."""
    return jitted(answer_of(shape, dispatcher), weights_of(numbers), numbers["x"], numbers["probe"])


@contextmanager
def switched_on(name: str) -> Iterator[None]:
    """A setting of jax is on inside the context, for what is compiled there."""
    if not hasattr(jax.config, name):
        raise UnavailableError(f"jax {jax.__version__} has no {name}")
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def triton_layer(shape: Shape, numbers: Numbers) -> Contestant:
    """Our layer with `ragged_dot`, which jax then lowers to its own grouped product in Triton on a GPU."""
    with switched_on(TRITON):
        try:
            return layer(shape, numbers, "ragged")
        except ModuleNotFoundError as missing:  # the wheel of jax 0.11.2 has the setting without the kernel
            raise UnavailableError(f"jax {jax.__version__} comes without its kernel: {missing}") from missing


def swiglu(weights: dict, x: jax.Array) -> jax.Array:
    """The answer of one SwiGLU expert."""
    return (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]


def dense(shape: Shape, numbers: Numbers) -> Contestant:
    """The dense limit: K * T rows through one expert."""
    x, probe = (jnp.tile(numbers[name], (shape.K, 1)) for name in ("x", "probe"))
    return jitted(swiglu, {name: numbers[name][0] for name in ("gate", "up", "down")}, x, probe, named=False)


def sorted_rows(shape: Shape, numbers: Numbers, grouped_product: Callable[..., jax.Array]) -> Contestant:
    """Rows sorted by expert and `grouped_product(rows, weights, group_sizes)`, as a user would write it."""

    def answer(weights: dict, x: jax.Array) -> jax.Array:
        score, expert = jax.lax.top_k(jax.nn.softmax((x @ weights["router"]).astype(jnp.float32)), shape.K)
        order = jnp.argsort(expert.reshape(-1))
        rows, sizes = x[order // shape.K], jnp.bincount(expert.reshape(-1), length=shape.E).astype(jnp.int32)
        product = partial(grouped_product, group_sizes=sizes)
        y = product(jax.nn.silu(product(rows, weights["gate"])) * product(rows, weights["up"]), weights["down"])
        score = score / score.sum(axis=-1, keepdims=True)
        y = (y * score.reshape(-1)[order][:, None]).astype(x.dtype)
        return jnp.zeros_like(x).at[order // shape.K].add(y)

    return jitted(answer, weights_of(numbers), numbers["x"], numbers["probe"])


def tokamax(shape: Shape, numbers: Numbers, implementation: str | None = None) -> Contestant:
    """Sorted rows with this kernel of tokamax, forward and backward; None: tokamax's choice for the device."""
    return sorted_rows(shape, numbers, tokamax_product(implementation))


def tokamax_product(implementation: str | None) -> Callable[..., jax.Array]:
    """`tokamax.ragged_dot` with this kernel. Raises UnavailableError if it does not import or has no such kernel."""
    try:
        import tokamax
        from tokamax._src.ops.ragged_dot.api import IMPLEMENTATIONS
    except ImportError as missing:
        raise UnavailableError(f"tokamax does not import: {missing}") from missing
    if implementation and not any(name.startswith(implementation) for name in IMPLEMENTATIONS):
        raise UnavailableError(f"tokamax has no {implementation} here; a package that it needs is missing")
    return partial(tokamax.ragged_dot, implementation=implementation)


def _nano_numbers(numbers: Numbers) -> Numbers:
    """Router, and per expert two matrices and their biases."""
    weights = {name: numbers[name] for name in ("router", "up", "down")}
    return weights | {f"{name}_bias": 0.1 * numbers[name][:, 0] for name in ("up", "down")}


def nano(shape: Shape, numbers: Numbers) -> Contestant:
    """`nano-moe-jax`'s layer, which runs every expert on every token."""
    from nano_moe.config import NanoMoEConfig
    from nano_moe.layers import MoELayer

    peer = MoELayer(NanoMoEConfig(d_model=shape.D, d_ff=shape.F, n_experts=shape.E, top_k=shape.K, dropout_rate=0.0))

    def answer(weights: dict, x: jax.Array) -> jax.Array:
        tree = {"Router_0": {"Dense_0": {"kernel": weights["router"]}}}
        for e in range(shape.E):
            up, down = ({"kernel": weights[n][e], "bias": weights[f"{n}_bias"][e]} for n in ("up", "down"))
            tree[f"expert_{e}"] = {"Dense_0": up, "Dense_1": down}
        return peer.apply({"params": tree}, x[None])[0][0]

    return jitted(answer, _nano_numbers(numbers), numbers["x"], numbers["probe"])


def as_nano(shape: Shape, numbers: Numbers) -> Contestant:
    """Our layer under nano-moe-jax's contract: GELU, biases, no gate."""
    expert = dataclasses.replace(shape.config().expert, activation="gelu_tanh", gated=False, bias=True)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: jax_moe.MoE(dataclasses.replace(shape.config(), expert=expert))))

    def answer(weights: dict, x: jax.Array) -> jax.Array:
        own = {name: weights[name] for name in ("up", "up_bias", "down", "down_bias")}
        return nnx.merge(graphdef, {"router": {"kernel": weights["router"]}, "experts": own})(x[None])[0][0]

    return jitted(answer, _nano_numbers(numbers), numbers["x"], numbers["probe"])


class Cost(NamedTuple):
    """What a contestant needs beside the work of the chosen experts."""

    work: float  # times the active FLOPs
    numbers: float  # numbers of the compute dtype alive at once, least estimate


def every_expert(shape: Shape) -> Cost:
    """Every expert answers every token: three [E, T, F] and their gradients."""
    return Cost(shape.E / shape.K, 6 * shape.E * shape.T * shape.F)


def masked_dense(shape: Shape) -> Cost:
    """XLA's `ragged_dot` without a kernel: E dense products over masked copies [E, R, D] and [E, R, F] of the rows."""
    if jax.default_backend() != "gpu" or "ragged_dot" in os.environ.get("XLA_FLAGS", ""):
        return Cost(1, 0)
    return Cost(shape.E, shape.E * shape.T * shape.K * (shape.D + shape.F))


def unless_kernel(shape: Shape) -> Cost:
    """`masked_dense` where the layer has no kernel of its own for the device."""
    return Cost(1, 0) if hopper_serves("bfloat16", shape.D, shape.F) else masked_dense(shape)


class Entry(NamedTuple):
    """A row of the table. `needs` are packages.

    `accelerator`: left out on a CPU unless `--only` names it; `cpu`: left out elsewhere unless `--only` names it.
    """

    make: Callable[[Shape, Numbers], Contestant]
    needs: tuple[str, ...] = ()
    accelerator: bool = False
    contract: str = "mixtral"
    cpu: bool = False
    cost: Callable[[Shape], Cost] = lambda shape: Cost(1, 0)


DENSE = "dense limit"
_HF = ("transformers", "torch")
_TOKAMAX = ("tokamax",)
ENTRIES: dict[str, Entry] = {
    DENSE: Entry(dense),
    "jax_moe grouped": Entry(partial(layer, dispatcher="grouped"), accelerator=True),
    "jax_moe auto": Entry(partial(layer, dispatcher="auto"), cost=unless_kernel),
    "jax_moe einsum": Entry(partial(layer, dispatcher="einsum"), cost=every_expert),
    "jax_moe ragged": Entry(partial(layer, dispatcher="ragged"), accelerator=True, cost=masked_dense),
    "jax_moe ragged triton": Entry(triton_layer, accelerator=True),
    "ragged_dot": Entry(partial(sorted_rows, grouped_product=jax.lax.ragged_dot), cost=masked_dense),
    "tokamax": Entry(tokamax, _TOKAMAX, accelerator=True),
    "tokamax triton": Entry(partial(tokamax, implementation="triton"), _TOKAMAX, accelerator=True),
    "tokamax mosaic": Entry(partial(tokamax, implementation="mosaic"), _TOKAMAX, accelerator=True),
    "transformers eager": Entry(partial(transformers_block, implementation="eager"), _HF, cpu=True),
    "transformers grouped_mm": Entry(partial(transformers_block, implementation="grouped_mm"), _HF),
    "nano-moe-jax": Entry(nano, ("nano_moe",), contract="nano", cost=every_expert),
    "jax_moe as nano": Entry(as_nano, ("nano_moe",), contract="nano"),
}


def names(only: set[str] | None) -> list[str]:
    """The contestants to run: `only`, else all whose packages are installed; the dense limit always."""
    if only is not None:
        return [name for name in ENTRIES if name in only or name == DENSE]
    on_cpu = jax.default_backend() == "cpu"
    elsewhere = {name for name, entry in ENTRIES.items() if (entry.accelerator if on_cpu else entry.cpu)}
    return [name for name, entry in ENTRIES.items() if not _missing(entry) and name not in elsewhere]


def available(name: str, shape: Shape, dtype: str, rate: float | None = None) -> None:
    """Raises UnavailableError if a package is missing, or if on an accelerator the cost is hopeless.

    Hopeless is more memory than the device has, or more than two seconds at `rate` FLOPs a second. On a CPU users wait.
    """
    if missing := _missing(ENTRIES[name]):
        raise UnavailableError(f"{missing[0]} is not installed")
    if jax.default_backend() == "cpu":
        return
    cost, limit = ENTRIES[name].cost(shape), (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    needed, seconds = cost.numbers * jnp.dtype(dtype).itemsize, cost.work * shape.flops("both") / (rate or float("inf"))
    if limit and needed > limit:
        raise UnavailableError(f"needs at least {needed / 2**30:.0f} GiB of {limit / 2**30:.0f}")
    if seconds > LONGEST:
        raise UnavailableError(f"a call would take at least {seconds:.1f} s: {cost.work:.0f} times the active FLOPs")


def _missing(entry: Entry) -> list[str]:
    return [package for package in entry.needs if find_spec(package) is None]
