"""How long does one dropless Mixtral layer take, against the dense limit and against peers?

    python -m benchmarks.moe_layer [--shape T,D,F,E,K]... [--only NAME,NAME] [--rounds 7] [--plot OUT.png] [--json]

The dense limit is one jitted SwiGLU FFN over K * T rows: the same active FLOPs without any routing. Peers: the experts
implementations of `transformers` (eager and grouped_mm), raw `jax.lax.ragged_dot` and, where installed, `nano-moe-jax` (its
layer under its own contract: GELU, biases). Checks first that all give the same answers and the same gradients; then times
forward alone and forward with backward in turn, and prints medians and ratios. `--plot` draws time against E and T.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_moe
from benchmarks.timing import alternate, machine, median_ratio
from jax_moe.config import MoEConfig

SHAPES = ((2048, 512, 1792, 8, 2), (2048, 512, 256, 64, 8), (8192, 256, 128, 128, 8))
SAME = 1e-4  # worst difference over the largest number, of the answer and of every gradient; measured 2e-6
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Contestant:
    """What is timed. `values` gives answer and gradients for the check; None where the computation is another."""

    forward: Callable[[], object]
    both: Callable[[], object]
    values: Callable[[], Arrays] | None


@dataclass(frozen=True)
class Shape:
    """T tokens of width D, E experts of width F, K of them a token; and its numbers."""

    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.T},{self.D},{self.F},{self.E},{self.K}"

    def config(self, dispatcher: str = "auto") -> MoEConfig:
        """The contract."""
        return dataclasses.replace(jax_moe.presets.mixtral(self.D, self.F, self.E, self.K), dispatcher=dispatcher)  # type: ignore[arg-type]

    def numbers(self) -> Arrays:
        """Input, probe and weights, the routers spread as at initialisation."""
        random = np.random.default_rng(0)
        shapes = {"x": (self.T, self.D), "probe": (self.T, self.D), "router": (self.D, self.E), "gate": (self.E, self.D, self.F),
                  "up": (self.E, self.D, self.F), "down": (self.E, self.F, self.D)}
        numbers = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        return {n: a if n in ("x", "probe") else a * np.float32(a.shape[-2] ** -0.5) for n, a in numbers.items()}


def jitted(function: Callable[[dict, jax.Array], jax.Array], weights: dict, x: Any, probe: Any, named: bool = True) -> Contestant:
    """A contestant of `function(weights, x) -> answer`; gradients of sum(answer * probe) in everything."""
    weights, x, probe = jax.tree.map(jnp.asarray, (weights, x, probe))
    forward = jax.jit(function)
    both = jax.jit(jax.value_and_grad(lambda w, x, probe: (function(w, x) * probe).sum(), argnums=(0, 1)))

    def values() -> Arrays:
        gradients, g_x = both(weights, x, probe)[1]
        return {name: np.asarray(a) for name, a in (("answer", forward(weights, x)), ("x", g_x), *gradients.items())}

    return Contestant(
        lambda: jax.block_until_ready(forward(weights, x)), lambda: jax.block_until_ready(both(weights, x, probe)),
        values if named else None,
    )


def layer(shape: Shape, numbers: Arrays, dispatcher: str) -> Contestant:
    """Our layer under one dispatcher."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: jax_moe.MoE(shape.config(dispatcher))))

    def answer(weights: dict, x: jax.Array) -> jax.Array:
        params = {"router": {"kernel": weights["router"]}, "experts": {name: weights[name] for name in ("gate", "up", "down")}}
        return nnx.merge(graphdef, params)(x[None])[0][0]

    return jitted(answer, {n: numbers[n] for n in ("router", "gate", "up", "down")}, numbers["x"], numbers["probe"])


def swiglu(weights: dict, x: jax.Array) -> jax.Array:
    """One expert."""
    return (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]


def dense(shape: Shape, numbers: Arrays) -> Contestant:
    """The limit: K * T rows through one expert."""
    rows = [np.tile(numbers[name], (shape.K, 1)) for name in ("x", "probe")]
    return jitted(swiglu, {name: numbers[name][0] for name in ("gate", "up", "down")}, *rows, named=False)


def raw_ragged_dot(shape: Shape, numbers: Arrays) -> Contestant:
    """Sorted rows and `jax.lax.ragged_dot`, as one would write it in ten lines."""

    def answer(weights: dict, x: jax.Array) -> jax.Array:
        score, expert = jax.lax.top_k(jax.nn.softmax(x @ weights["router"]), shape.K)
        order = jnp.argsort(expert.reshape(-1))
        rows, sizes = x[order // shape.K], jnp.bincount(expert.reshape(-1), length=shape.E)
        product = partial(jax.lax.ragged_dot, group_sizes=sizes)
        y = product(jax.nn.silu(product(rows, weights["gate"])) * product(rows, weights["up"]), weights["down"])
        score = score / score.sum(axis=-1, keepdims=True)
        return jnp.zeros_like(x).at[order // shape.K].add(y * score.reshape(-1)[order][:, None])

    return jitted(answer, {n: numbers[n] for n in ("router", "gate", "up", "down")}, numbers["x"], numbers["probe"])


def transformers_block(shape: Shape, numbers: Arrays, implementation: str) -> Contestant:
    """`MixtralSparseMoeBlock`, with our weights."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=shape.D, intermediate_size=shape.F, num_local_experts=shape.E, num_experts_per_tok=shape.K)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    gate_up = np.concatenate([numbers["gate"], numbers["up"]], axis=2).swapaxes(1, 2)
    theirs = {
        "gate.weight": numbers["router"].T, "experts.gate_up_proj": gate_up, "experts.down_proj": numbers["down"].swapaxes(1, 2),
    }
    block.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in theirs.items()})
    x, probe = (torch.from_numpy(numbers[name])[None] for name in ("x", "probe"))
    x.requires_grad_()

    def forward() -> Any:
        with torch.no_grad():
            return block(x)

    def both() -> Any:
        block.zero_grad(set_to_none=True)
        x.grad = None
        (block(x) * probe).sum().backward()

    def values() -> Arrays:
        both()
        gate, up = np.split(block.experts.gate_up_proj.grad.numpy().swapaxes(1, 2), 2, axis=2)
        assert x.grad is not None
        return {
            "answer": forward()[0].numpy(), "x": x.grad[0].numpy(), "router": block.gate.weight.grad.numpy().T,
            "gate": gate, "up": up, "down": block.experts.down_proj.grad.numpy().swapaxes(1, 2),
        }

    return Contestant(forward, both, values)


def nano(shape: Shape, numbers: Arrays) -> tuple[Contestant, Contestant]:
    """`nano-moe-jax`'s layer, which runs every expert on every token, and ours under its contract."""

    from nano_moe.config import NanoMoEConfig
    from nano_moe.layers import MoELayer

    theirs = MoELayer(NanoMoEConfig(d_model=shape.D, d_ff=shape.F, n_experts=shape.E, top_k=shape.K, dropout_rate=0.0))
    x = jnp.asarray(numbers["x"])
    params = theirs.init(jax.random.key(0), x[None])["params"]

    def their_answer(weights: dict, x: jax.Array) -> jax.Array:
        tree = {"Router_0": {"Dense_0": {"kernel": weights["router"]}}}
        for e in range(shape.E):
            up, down = ({"kernel": weights[n][e], "bias": weights[f"{n}_bias"][e]} for n in ("up", "down"))
            tree[f"expert_{e}"] = {"Dense_0": up, "Dense_1": down}
        return theirs.apply({"params": tree}, x[None])[0][0]

    expert = dataclasses.replace(shape.config().expert, activation="gelu_tanh", gated=False, bias=True)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: jax_moe.MoE(dataclasses.replace(shape.config(), expert=expert))))

    def our_answer(weights: dict, x: jax.Array) -> jax.Array:
        own = {name: weights[name] for name in ("up", "up_bias", "down", "down_bias")}
        return nnx.merge(graphdef, {"router": {"kernel": weights["router"]}, "experts": own})(x[None])[0][0]

    stack = {f"{n}{s}": jnp.stack([params[f"expert_{e}"][d][k] for e in range(shape.E)])
             for n, d in (("up", "Dense_0"), ("down", "Dense_1")) for s, k in (("", "kernel"), ("_bias", "bias"))}
    weights = stack | {"router": params["Router_0"]["Dense_0"]["kernel"]}
    return tuple(jitted(one, weights, x, numbers["probe"]) for one in (their_answer, our_answer))  # type: ignore[return-value]


def contestants(shape: Shape, only: set[str] | None) -> dict[str, Contestant]:
    """All that can run here, after the check that they agree."""
    numbers = shape.numbers()
    makers: dict[str, Callable[[], Contestant]] = {
        "dense limit": partial(dense, shape, numbers),
        "jax_moe auto": partial(layer, shape, numbers, "auto"),
        "jax_moe einsum": partial(layer, shape, numbers, "einsum"),
        "ragged_dot": partial(raw_ragged_dot, shape, numbers),
    }
    if find_spec("transformers") and find_spec("torch"):
        for name in ("eager", "grouped_mm"):
            makers[f"transformers {name}"] = partial(transformers_block, shape, numbers, name)
    chosen = {name: make() for name, make in makers.items() if only is None or name in only or name == "dense limit"}
    agree({name: one for name, one in chosen.items() if one.values})
    if find_spec("nano_moe") and (only is None or "nano-moe-jax" in only):
        theirs, ours = nano(shape, numbers)
        agree({"nano-moe-jax": theirs, "jax_moe, nano's contract": ours})
        chosen |= {"nano-moe-jax": theirs, "jax_moe, nano's contract": ours}
    return chosen


def agree(group: dict[str, Contestant]) -> None:
    """Raises AssertionError unless all have the first one's answer and gradients."""
    base = None
    for name, one in group.items():
        assert one.values is not None
        values = one.values()
        base = values if base is None else base
        for what, expected in base.items():
            error = float(np.abs(values[what] - expected).max() / np.abs(expected).max())
            assert error < SAME, f"{name}: {what} differs by {error:.1e}"


def measure(shape: Shape, rounds: int, only: set[str] | None) -> dict[str, Any]:
    """Medians in ms and ratios to the dense limit."""
    group = contestants(shape, only)
    result: dict[str, Any] = {"shape": shape.name}
    for kind in ("forward", "both"):
        seconds = alternate({name: getattr(one, kind) for name, one in group.items()}, rounds, warmup=2)
        result[kind] = {
            name: {"ms": 1e3 * statistics.median(times), "ratio": median_ratio(seconds, name, "dense limit")}
            for name, times in seconds.items()
        }
    return result


def show(result: dict[str, Any]) -> None:
    """The table."""
    print(f"\nT,D,F,E,K = {result['shape']}\n{'':26}{'forward':>12}{'/ dense':>9}{'with backward':>16}{'/ dense':>9}")
    for name in result["forward"]:
        row = [result[kind][name] for kind in ("forward", "both")]
        print(f"{name:26}{row[0]['ms']:9.1f} ms{row[0]['ratio']:9.2f}{row[1]['ms']:13.1f} ms{row[1]['ratio']:9.2f}")


def draw(rounds: int, only: set[str] | None, out: Path) -> list[dict[str, Any]]:
    """Time against E at equal active FLOPs, and against T; the figure and its numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweeps = {
        "experts E (T=2048, D=256, F=128, K=8)": [Shape(2048, 256, 128, E, 8) for E in (8, 16, 32, 64, 128)],
        "tokens T (D=256, F=128, E=64, K=8)": [Shape(T, 256, 128, 64, 8) for T in (512, 1024, 2048, 4096, 8192)],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    results = []
    for axis, (label, shapes) in zip(axes, sweeps.items(), strict=True):
        points = [measure(shape, rounds, only) for shape in shapes]
        results += points
        across = [shape.E if label.startswith("experts") else shape.T for shape in shapes]
        for name in points[0]["both"]:
            axis.plot(across, [point["both"][name]["ms"] for point in points], marker="o", markersize=4, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks(across, [str(x) for x in across], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward and backward, ms")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    return results


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_layer", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", action="append", help="T,D,F,E,K; the three published shapes by default")
    parser.add_argument("--only", help="names of contestants, by commas; the dense limit always runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plot", type=Path, help="draw time against E and T instead")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    only = set(arguments.only.split(",")) if arguments.only else None
    shapes = [Shape(*map(int, text.split(","))) for text in arguments.shape or []] or [Shape(*shape) for shape in SHAPES]
    if arguments.plot:
        results = draw(arguments.rounds, only, arguments.plot)
    else:
        results = []
        for shape in shapes:
            results.append(measure(shape, arguments.rounds, only))
            if not arguments.json:
                show(results[-1])
    if arguments.json:
        print(json.dumps({"machine": machine(), "rounds": arguments.rounds, "results": results}, indent=1))
    else:
        print(f"\n{machine()}")


if __name__ == "__main__":
    main()
