"""The contestants of `benchmarks.moe_layer`: our layer under its dispatchers, the dense limit and the peers.

All start from the same numbers in the same dtype. All but the dense limit return their answer and gradients, so that
they are compared before they are timed, on the device where they are. The contestants of jax share the weights' arrays;
`transformers` has a second copy, laid out as it wants. The file is long because every contestant is a function here.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jax_moe
from jax_moe.config.moe import MoEConfig

# Largest difference divided by the largest number, of the answer and of every gradient; measured 2e-6 and 1e-2.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2}
# Least gap between the router logits of the last chosen and the first unchosen expert: more than the rounding error of
# a logit of up to 4 (in fp32 a choice with a gap of 8e-7 was seen to flip).
MARGIN = {"float32": 2**-16, "bfloat16": 2**-5}
TRITON = "jax_ragged_dot_use_gpu_pallas_triton_lowering"  # a setting of jax 0.10 and 0.11, gone in 0.12
Numbers = dict[str, jax.Array]
Values = dict[str, jax.Array]
LONGEST = 2.0  # seconds of a forward with backward at the rate of a large product; more is hopeless on an accelerator


class UnavailableError(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """The timed functions. `values` returns answer and gradients; None if the contestant computes something else.

    `peak` returns the bytes of a forward with backward: weights, input, probe, gradients and everything between; None
    where nothing counts them.
    """

    forward: Callable[[], object]
    both: Callable[[], object]
    values: Callable[[], Values] | None
    peak: Callable[[], int | None] = lambda: None


@dataclass(frozen=True)
class Shape:
    """T tokens of width D, E experts of width F, K experts per token."""

    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def name(self) -> str:
        """T,D,F,E,K, as on the command line."""
        return f"{self.T},{self.D},{self.F},{self.E},{self.K}"

    def flops(self, kind: str) -> int:
        """FLOPs of the experts' matrix products: three per token and choice, and six more for the gradients."""
        return 6 * self.T * self.K * self.D * self.F * (3 if kind == "both" else 1)

    def config(self, dispatcher: str = "auto") -> MoEConfig:
        """The contract."""
        mixtral = jax_moe.presets.mixtral(self.D, self.F, self.E, self.K)
        return dataclasses.replace(mixtral, dispatcher=dispatcher)  # type: ignore[arg-type]

    def numbers(self, dtype: str) -> Numbers:
        """Input, probe and weights, the routers spread as at initialisation.

        Tokens whose choice could flip by rounding to the dtype are replaced by other tokens, so that all contestants
        do the same work.
        """
        T, D, F, E = self.T, self.D, self.F, self.E
        sizes = {"x": (T, D), "probe": (T, D), "router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(sizes))  # threefry needs gigabytes of counters
        numbers = {
            name: draw(key, size, dtype, 1.0 if name in ("x", "probe") else size[-2] ** -0.5)
            for key, (name, size) in zip(keys, sizes.items(), strict=True)
        }
        if MARGIN[dtype] and self.K < self.E:
            numbers["x"], sure = _without_ties(numbers["x"], numbers["router"], self.K, MARGIN[dtype])
            if not sure:
                raise UnavailableError(f"all {self.T} tokens are near ties in {dtype}: take more tokens")
        return numbers


@partial(jax.jit, static_argnums=(1, 2, 3))
def draw(key: jax.Array, size: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Normal numbers with this standard deviation, on the device of jax."""
    return (jax.random.normal(key, size) * scale).astype(dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _without_ties(x: jax.Array, router: jax.Array, K: int, margin: float) -> tuple[jax.Array, jax.Array]:
    """(the tokens whose choice is sure, repeated until there are as many as before; how many they are)."""
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision="highest")
    largest = jax.lax.top_k(logits, K + 1)[0]
    near = largest[:, K - 1] - largest[:, K] <= margin
    sure = (~near).sum()
    return x[jnp.argsort(near, stable=True)[jnp.arange(x.shape[0]) % jnp.maximum(sure, 1)]], sure


def jitted(
    function: Callable[[dict, jax.Array], jax.Array], weights: dict, x: Any, probe: Any, named: bool = True
) -> Contestant:
    """A contestant for `function(weights, x) -> answer`; gradients are those of sum(answer * probe)."""
    forward = jax.jit(function).lower(weights, x).compile()
    loss = jax.value_and_grad(lambda w, x, probe: (function(w, x) * probe).sum(), argnums=(0, 1))
    both = jax.jit(loss).lower(weights, x, probe).compile()

    def values() -> Values:
        gradients, g_x = both(weights, x, probe)[1]
        return {"answer": forward(weights, x), "x": g_x, **gradients}

    def peak() -> int | None:
        memory = both.memory_analysis()
        if memory is None:
            return None
        arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
        return int(arguments + outputs + memory.temp_size_in_bytes - memory.alias_size_in_bytes)

    return Contestant(
        lambda: jax.block_until_ready(forward(weights, x)), lambda: jax.block_until_ready(both(weights, x, probe)),
        values if named else None, peak,
    )


def _weights(numbers: Numbers) -> Numbers:
    return {name: numbers[name] for name in ("router", "gate", "up", "down")}


def layer(shape: Shape, numbers: Numbers, dispatcher: str) -> Contestant:
    """Our layer with this dispatcher."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: jax_moe.MoE(shape.config(dispatcher))))

    def answer(weights: dict, x: jax.Array) -> jax.Array:
        experts = {name: weights[name] for name in ("gate", "up", "down")}
        params = {"router": {"kernel": weights["router"]}, "experts": experts}
        return nnx.merge(graphdef, params)(x[None])[0][0]

    return jitted(answer, _weights(numbers), numbers["x"], numbers["probe"])


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

    return jitted(answer, _weights(numbers), numbers["x"], numbers["probe"])


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


def to_torch(array: jax.Array) -> Any:
    """The same memory as a torch tensor, on the same device. Raises UnavailableError if torch does not see the GPU."""
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise UnavailableError(f"torch {torch.__version__} sees no GPU")
    return torch.from_dlpack(jax.block_until_ready(array))


def from_torch(tensor: Any) -> jax.Array:
    """The same memory as an array of jax, on the same device; not contiguous tensors are copied."""
    finish_torch()
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def finish_torch() -> None:
    """Waits for the GPU, if jax uses one."""
    import torch

    if jax.default_backend() == "gpu":
        torch.cuda.synchronize()


@jax.jit
def _as_mixtral(numbers: Numbers) -> dict[str, jax.Array]:
    """The state of a `MixtralSparseMoeBlock`: weights lie transposed, gate and up are stacked."""
    return {
        "gate.weight": numbers["router"].T, "experts.down_proj": numbers["down"].mT,
        "experts.gate_up_proj": jnp.concatenate([numbers["gate"].mT, numbers["up"].mT], axis=1),
    }


@jax.jit
def _from_mixtral(router: jax.Array, gate_up: jax.Array, down: jax.Array) -> Values:
    """Our names and layout for arrays of a `MixtralSparseMoeBlock`."""
    gate, up = jnp.split(gate_up.mT, 2, axis=2)
    return {"router": router.T, "gate": gate, "up": up, "down": down.mT}


def mixtral_block(shape: Shape, numbers: Numbers, implementation: str) -> Any:
    """transformers' `MixtralSparseMoeBlock` with these weights, on the device of jax."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.D, intermediate_size=shape.F, num_local_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = implementation
    state = {name: to_torch(array) for name, array in _as_mixtral(_weights(numbers)).items()}
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.load_state_dict(state, assign=True)
    return block


def transformers_block(shape: Shape, numbers: Numbers, implementation: str) -> Contestant:
    """`mixtral_block`, forward and backward."""
    import torch

    block = mixtral_block(shape, numbers, implementation)
    x, probe = (to_torch(numbers[name])[None] for name in ("x", "probe"))
    x.requires_grad_()
    inputs = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj, x

    def forward() -> Any:
        with torch.no_grad():
            answer = block(x)
        finish_torch()
        return answer

    def forget() -> None:
        for tensor in inputs:
            tensor.grad = None

    def both() -> None:
        forget()
        (block(x) * probe).sum().backward()
        finish_torch()

    def values() -> Values:
        both()
        router, gate_up, down, g_x = (from_torch(tensor.grad) for tensor in inputs)
        forget()
        return {"answer": from_torch(forward()[0]), "x": g_x[0], **_from_mixtral(router, gate_up, down)}

    def peak() -> int | None:  # the weights, the input and the probe lie in memory of jax, which torch does not count
        if x.device.type != "cuda":
            return None
        forget()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        forget()
        shared = sum(tensor.nbytes for tensor in (*inputs, probe))
        return int(torch.cuda.max_memory_allocated() - before + shared)

    return Contestant(forward, both, values, peak)


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
    "jax_moe auto": Entry(partial(layer, dispatcher="auto"), cost=masked_dense),
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


def difference(found: Values, expected: Values) -> tuple[float, str]:
    """(largest difference divided by the largest expected number, the name of the array where it occurs).

    Infinite if a value is not finite. Computed on the device, in fp32.
    """
    return max((float(_relative_error(found[name], a)), name) for name, a in expected.items())


@jax.jit
def _relative_error(found: jax.Array, expected: jax.Array) -> jax.Array:
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    finite = jnp.isfinite(found).all() & jnp.isfinite(expected).all()
    distance, scale = jnp.abs(found - expected).max(), jnp.abs(expected).max()
    return jnp.where(finite, jnp.where(distance == 0, 0, distance / scale), jnp.inf)
