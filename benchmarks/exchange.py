"""How many bytes does a device send to the devices of the experts, by each exchange, and how long does that take?

    python -m benchmarks.exchange [--tokens 4096] [--json]
    python -m benchmarks.exchange --time [--tokens 32768] [--width 256] [--rounds 20] [--json]

Compiles forward with backward of one Mixtral layer for eight simulated devices, all on the expert axis, and counts the
bytes of the compiled program's collectives (`benchmarks/hlo.py`), beside those of the rows alone, from theory. Of
`padded` the usual program counts, with twice the even share of rows. `auto` must send the least of those that can
run; the exit status is 0 either way.

With `--time` the steps run, by turns, and so does what an exchange sends by itself: the same collectives of buffers of
the same size, forward and backward, in a program that does nothing else. Eight devices share the cores of one machine,
so that these are times of copies in its memory.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import benchmarks.eight_devices  # isort: skip  # noqa: F401  # before jax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_moe
from benchmarks.command import read_options
from benchmarks.hlo import count
from benchmarks.timing import alternate, machine
from jax_moe import presets, sharding
from jax_moe.config.checks import check_positive_ints, require
from jax_moe.config.moe import MoEConfig
from jax_moe.parameters import declared
from jax_moe.sharding.mesh import EXPERT_AXIS
from jax_moe.sharding.rules import batch_split, split_tree

DEVICES, SEQUENCES = 8, 8
SIZES = ((8, 2), (64, 2), (64, 8))
CONTRACTS = ("dropless", "capacity of the batch", "capacity of a sequence")
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Which sizes."""

    tokens: int = 4096
    """Tokens of the batch, in eight sequences."""
    width: int = 64
    """D, and F of the experts."""
    time: bool = False
    """Run the steps and time them."""
    rounds: int = 20
    """Of each step."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(tokens=self.tokens, width=self.width, rounds=self.rounds)
        require(self.tokens % SEQUENCES == 0, "tokens", self.tokens, f"a multiple of {SEQUENCES}")


def contract(kind: str, width: int, num_experts: int, top_k: int) -> MoEConfig:
    """A layer's contract: dropless, or with capacity factor 1 for the whole batch or for each sequence."""
    dropless = presets.mixtral(width, width, num_experts, top_k)
    groups = {"capacity of the batch": "batch", "capacity of a sequence": "sequence"}
    return dropless.with_capacity(1, group=groups[kind]) if kind in groups else dropless


def exchanges(kind: str) -> tuple[str, ...]:
    """Those that can run, and auto."""
    return ("xla", *(() if kind == "dropless" else ("all_to_all",)), "padded", "ring", "auto")


def layer_step(config: MoEConfig, tokens: int) -> tuple[Callable, tuple, tuple]:
    """Forward with backward: the jitted function, the shapes of its arguments, and where they lie."""
    mesh = sharding.expert_mesh(DEVICES)
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: jax_moe.MoE(config)), nnx.Param, ...)
    params, arrays = nnx.to_pure_dict(params), declared(nnx.merge(graphdef, params, rest))
    x = jax.ShapeDtypeStruct((SEQUENCES, tokens // SEQUENCES, config.model_dim), jnp.float32)
    places = split_tree(mesh, params, arrays), batch_split(mesh, SEQUENCES)

    def loss(params: dict, x_BTD: jax.Array) -> jax.Array:
        return (nnx.merge(graphdef, params, rest)(x_BTD)[0] ** 2).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=places, out_shardings=places)
    return step, (params, x), places


def sent(config: MoEConfig, exchange: str, tokens: int) -> float:
    """The bytes that a device sends, forward and backward."""
    step, shapes, _ = layer_step(config, tokens)
    with jax.set_mesh(sharding.expert_mesh(DEVICES)), sharding.exchange(exchange):
        return sum(count(step.lower(*shapes).compile().as_text()).sent.values())


def rows_sent(config: MoEConfig, exchange: str, tokens: int) -> int | None:
    """The rows that a device puts on their way to the experts, those for itself included; None for `xla` and `auto`."""
    n, e, X = tokens // DEVICES, config.num_experts // DEVICES, DEVICES
    groups = 1 if config.capacity is None or config.capacity.group == "batch" else SEQUENCES // DEVICES
    capacity = config.expert_capacity(config.group_size(SEQUENCES, tokens // SEQUENCES))
    return {
        "all_to_all": config.num_experts * min(n, capacity * groups),
        "padded": X * min(n * min(config.top_k, e), 2 * n * config.top_k // X), "ring": X * n,
    }.get(exchange)


def in_theory(config: MoEConfig, exchange: str, tokens: int) -> float | None:
    """The bytes of rows of fp32, four times over the links: to the experts and back, and so do their gradients."""
    rows = rows_sent(config, exchange, tokens)
    return None if rows is None else 4 * rows * config.model_dim * 4 * (DEVICES - 1) / DEVICES


def collectives(exchange: str, rows: int, width: int) -> tuple[Callable, tuple]:
    """What an exchange sends forward and backward, by itself; and its argument, of `rows` for each device."""

    def there_and_back(x: jax.Array) -> jax.Array:
        if exchange == "ring":
            whole = jax.lax.all_gather(x[: rows // DEVICES], EXPERT_AXIS, tiled=True)
            part = jax.lax.psum_scatter(whole, EXPERT_AXIS, tiled=True)
            return jnp.concatenate([part] * DEVICES)
        return jax.lax.all_to_all(jax.lax.all_to_all(x, EXPERT_AXIS, 0, 0, tiled=True), EXPERT_AXIS, 0, 0, tiled=True)

    mesh, split = sharding.expert_mesh(DEVICES), jax.P(EXPERT_AXIS)
    both = jax.shard_map(
        lambda x: there_and_back(there_and_back(x)), mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )
    x = jax.device_put(np.ones((DEVICES * rows, width), np.float32), jax.NamedSharding(mesh, split))
    return jax.jit(both), (x,)


def times(config: MoEConfig, names: tuple[str, ...], tokens: int, rounds: int) -> Row:
    """{exchange: milliseconds of a step, and of its collectives alone}, medians of steps by turns."""
    contestants: dict[str, Callable[[], object]] = {}
    draw = np.random.default_rng(0)

    def add(name: str, program: Callable, arguments: tuple) -> None:
        contestants[name] = lambda: jax.block_until_ready(program(*arguments))

    with jax.set_mesh(sharding.expert_mesh(DEVICES)):
        for name in names:
            step, shapes, places = layer_step(config, tokens)
            host = jax.tree.map(lambda leaf: draw.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
            placed = jax.device_put(host, places)
            with sharding.exchange(name):
                add(name, step.lower(*placed).compile(), placed)
            rows = rows_sent(config, name, tokens)
            if rows is not None:
                add(f"{name} alone", *collectives(name, rows, config.model_dim))
        xla = {"xla": contestants.pop("xla")}  # by itself: it takes and gives back much memory, which slows the others
        seconds = alternate(contestants, rounds, warmup=2) | alternate(xla, rounds, warmup=2)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def measure(asked: Options, kind: str, num_experts: int, top_k: int) -> Row:
    """The bytes of each exchange, counted and in theory; with `--time` those in theory and milliseconds."""
    config, names = contract(kind, asked.width, num_experts, top_k), exchanges(kind)
    row = {
        "contract": kind, "E": num_experts, "K": top_k,
        "theory": {name: in_theory(config, name, asked.tokens) for name in names},
    }
    if asked.time:
        return row | {"milliseconds": times(config, names[:-1], asked.tokens, asked.rounds)}
    return row | {"sent": {name: sent(config, name, asked.tokens) for name in names}}


def show(row: Row) -> None:
    """Prints the exchanges of a contract."""
    print(f"{row['contract']}, E={row['E']}, K={row['K']}")
    for name, theory in row["theory"].items():
        rows_alone = f"{f'({theory / 1024:.0f})':>10}" if theory else " " * 10
        if "sent" in row:
            print(f"  {name:12}{row['sent'][name] / 1024:10.0f}{rows_alone}".rstrip())
        elif name in row["milliseconds"]:
            alone = row["milliseconds"].get(f"{name} alone")
            rate = f"{alone:12.2f}{theory / alone / 1e6:12.2f}" if alone else ""
            print(f"  {name:12}{rows_alone}{row['milliseconds'][name]:12.2f}{rate}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = read_options(Options, "benchmarks.exchange", __doc__, arguments)
    about: Row = {"tokens": asked.tokens, "width": asked.width, "devices": DEVICES, **machine()}
    if asked.json:
        rows = [measure(asked, kind, *size) for kind in CONTRACTS for size in SIZES]
        print(json.dumps(about | {"results": rows}, indent=1))
        return 0
    sizes = f"{asked.tokens} tokens, D={asked.width}"
    if asked.time:
        print(f"{sizes}; KiB that a device sends (theory), ms of a step, ms of sending alone, GB/s of it; {machine()}")
    else:
        print(f"KiB that each of {DEVICES} devices sends (rows alone, in theory): {sizes}")
    for kind in CONTRACTS:
        for size in SIZES:
            show(measure(asked, kind, *size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
