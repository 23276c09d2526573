"""The contestants of `benchmarks.moe_layer`: our layer under its dispatchers, the dense limit and the peers.

All start from the same numbers in the same dtype. All but the dense limit return their answer and gradients, so that
they are compared before they are timed. The file is long because every contestant is a function here.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_moe
from jax_moe.config.moe import MoEConfig
from moe_parity.relative import relative_error

# Largest difference divided by the largest number, of the answer and of every gradient; measured 2e-6 and 1e-2.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2}
# Least gap between the router logits of the last chosen and the first unchosen expert: more than the rounding error of
# a logit of up to 4 (in fp32 a choice with a gap of 8e-7 was seen to flip).
MARGIN = {"float32": 2**-16, "bfloat16": 2**-5}
TRITON = "jax_ragged_dot_use_gpu_pallas_triton_lowering"  # a setting of jax 0.10 and 0.11, gone in 0.12
Numbers = dict[str, jax.Array]
Values = dict[str, np.ndarray]


class UnavailableError(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """The timed functions. `values` returns answer and gradients; None if the contestant computes something else."""

    forward: Callable[[], object]
    both: Callable[[], object]
    values: Callable[[], Values] | None


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
        random = np.random.default_rng(0)
        shapes = {
            "x": (self.T, self.D), "probe": (self.T, self.D), "router": (self.D, self.E),
            "gate": (self.E, self.D, self.F), "up": (self.E, self.D, self.F), "down": (self.E, self.F, self.D),
        }
        numbers = {}
        for name, shape in shapes.items():
            scale = 1.0 if name in ("x", "probe") else shape[-2] ** -0.5
            numbers[name] = jnp.asarray(random.standard_normal(shape, np.float32) * np.float32(scale), dtype)
        if MARGIN[dtype] and self.K < self.E:
            x, router = (np.asarray(numbers[name], np.float32) for name in ("x", "router"))
            logits = np.sort(x @ router, axis=1)
            sure = x[logits[:, -self.K] - logits[:, -self.K - 1] > MARGIN[dtype]]
            if not len(sure):
                raise UnavailableError(f"all {self.T} tokens are near ties in {dtype}: take more tokens")
            numbers["x"] = jnp.asarray(np.resize(sure, x.shape), dtype)
        return numbers


def jitted(
    function: Callable[[dict, jax.Array], jax.Array], weights: dict, x: Any, probe: Any, named: bool = True
) -> Contestant:
    """A contestant for `function(weights, x) -> answer`; gradients are those of sum(answer * probe)."""
    forward = jax.jit(function).lower(weights, x).compile()
    loss = jax.value_and_grad(lambda w, x, probe: (function(w, x) * probe).sum(), argnums=(0, 1))
    both = jax.jit(loss).lower(weights, x, probe).compile()

    def values() -> Values:
        gradients, g_x = both(weights, x, probe)[1]
        named = {"answer": forward(weights, x), "x": g_x, **gradients}
        return {name: np.asarray(a, np.float32) for name, a in named.items()}

    return Contestant(
        lambda: jax.block_until_ready(forward(weights, x)), lambda: jax.block_until_ready(both(weights, x, probe)),
        values if named else None,
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
        return layer(shape, numbers, "ragged")


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


def tokamax(shape: Shape, numbers: Numbers) -> Contestant:
    """Sorted rows with tokamax's kernels for the device, forward and backward."""
    import tokamax

    return sorted_rows(shape, numbers, tokamax.ragged_dot)


def torch_device() -> str:
    """The device of the torch contestants: the GPU if jax uses it too."""
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def transformers_block(shape: Shape, numbers: Numbers, implementation: str) -> Contestant:
    """transformers' `MixtralSparseMoeBlock` with the same weights, on the GPU if jax uses it too."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    where, dtype = torch_device(), getattr(torch, numbers["x"].dtype.name)
    config = MixtralConfig(
        hidden_size=shape.D, intermediate_size=shape.F, num_local_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = implementation
    with torch.device(where):
        block = MixtralSparseMoeBlock(config).to(dtype)
    numpy = {name: np.asarray(a, np.float32) for name, a in numbers.items()}
    state = {
        "gate.weight": numpy["router"].T, "experts.down_proj": numpy["down"].swapaxes(1, 2),
        "experts.gate_up_proj": np.concatenate([numpy["gate"], numpy["up"]], axis=2).swapaxes(1, 2),
    }
    block.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in state.items()})
    x, probe = (torch.tensor(numpy[name], dtype=dtype, device=where)[None] for name in ("x", "probe"))
    x.requires_grad_()
    finish = torch.cuda.synchronize if where == "cuda" else lambda: None

    def forward() -> Any:
        with torch.no_grad():
            answer = block(x)
        finish()
        return answer

    def both() -> Any:
        block.zero_grad(set_to_none=True)
        x.grad = None
        (block(x) * probe).sum().backward()
        finish()

    def values() -> Values:
        both()
        weights = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj, x
        router, gate_up, down, input = (weight.grad for weight in weights)
        assert router is not None and gate_up is not None and down is not None and input is not None
        gate, up = gate_up.mT.chunk(2, dim=2)
        found = {"answer": forward()[0], "x": input[0], "router": router.T, "gate": gate, "up": up, "down": down.mT}
        return {name: a.float().cpu().numpy() for name, a in found.items()}

    return Contestant(forward, both, values)


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


class Entry(NamedTuple):
    """A row of the table. `needs` are packages; `accelerator`: left out on a CPU unless `--only` names it."""

    make: Callable[[Shape, Numbers], Contestant]
    needs: tuple[str, ...] = ()
    accelerator: bool = False
    contract: str = "mixtral"


DENSE = "dense limit"
_HF = ("transformers", "torch")
ENTRIES: dict[str, Entry] = {
    DENSE: Entry(dense),
    "jax_moe auto": Entry(partial(layer, dispatcher="auto")),
    "jax_moe einsum": Entry(partial(layer, dispatcher="einsum")),
    "jax_moe ragged": Entry(partial(layer, dispatcher="ragged"), accelerator=True),
    "jax_moe ragged triton": Entry(triton_layer, accelerator=True),
    "ragged_dot": Entry(partial(sorted_rows, grouped_product=jax.lax.ragged_dot)),
    "tokamax": Entry(tokamax, ("tokamax",), accelerator=True),
    "transformers eager": Entry(partial(transformers_block, implementation="eager"), _HF),
    "transformers grouped_mm": Entry(partial(transformers_block, implementation="grouped_mm"), _HF),
    "nano-moe-jax": Entry(nano, ("nano_moe",), contract="nano"),
    "jax_moe as nano": Entry(as_nano, ("nano_moe",), contract="nano"),
}


def names(only: set[str] | None) -> list[str]:
    """The contestants to run: `only`, else all whose packages are installed; the dense limit always."""
    if only is not None:
        return [name for name in ENTRIES if name in only or name == DENSE]
    on_cpu = jax.default_backend() == "cpu"
    return [name for name, entry in ENTRIES.items() if not _missing(entry) and not (on_cpu and entry.accelerator)]


def available(name: str) -> None:
    """Raises UnavailableError if a package that the contestant needs is missing."""
    if missing := _missing(ENTRIES[name]):
        raise UnavailableError(f"{missing[0]} is not installed")


def _missing(entry: Entry) -> list[str]:
    return [package for package in entry.needs if find_spec(package) is None]


def difference(found: Values, expected: Values) -> tuple[float, str]:
    """(largest difference divided by the largest expected number, the name of the array where it occurs)."""
    return max((relative_error(found[name], a), name) for name, a in expected.items())
