"""How many bytes does a device send to the devices of the experts, by each exchange?

    python -m benchmarks.exchange [--tokens 4096] [--json]

Compiles forward with backward of one Mixtral layer for eight simulated devices, all on the expert axis, and counts the
bytes of the compiled program's collectives (`benchmarks/hlo.py`), beside those of the rows alone, from theory. Of
`padded` the usual program counts, with twice the even share of rows. `auto` must send the least of those that can
run; the exit status is 0 either way. Bytes, not times.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import benchmarks.eight_devices  # isort: skip  # noqa: F401  # before jax
import jax
import jax.numpy as jnp
from flax import nnx

import jax_moe
from benchmarks.command import read_options
from benchmarks.hlo import count
from jax_moe import presets, sharding
from jax_moe.config.checks import check_positive_ints, require
from jax_moe.config.moe import MoEConfig
from jax_moe.parameters import declared
from jax_moe.sharding.rules import batch_split, split_tree

DEVICES, SEQUENCES, WIDTH, EXPERT_WIDTH = 8, 8, 64, 64
SIZES = ((8, 2), (64, 2), (64, 8))
CONTRACTS = ("dropless", "capacity of the batch", "capacity of a sequence")
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Which sizes."""

    tokens: int = 4096
    """Tokens of the batch, in eight sequences."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(tokens=self.tokens)
        require(self.tokens % SEQUENCES == 0, "tokens", self.tokens, f"a multiple of {SEQUENCES}")


def contract(kind: str, num_experts: int, top_k: int) -> MoEConfig:
    """A layer's contract: dropless, or with capacity factor 1 for the whole batch or for each sequence."""
    dropless = presets.mixtral(WIDTH, EXPERT_WIDTH, num_experts, top_k)
    groups = {"capacity of the batch": "batch", "capacity of a sequence": "sequence"}
    return dropless.with_capacity(1, group=groups[kind]) if kind in groups else dropless


def exchanges(kind: str) -> tuple[str, ...]:
    """Those that can run, and auto."""
    return ("xla", *(() if kind == "dropless" else ("all_to_all",)), "padded", "ring", "auto")


def sent(config: MoEConfig, exchange: str, tokens: int) -> float:
    """The bytes that a device sends, forward and backward."""
    mesh = sharding.expert_mesh(DEVICES)
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: jax_moe.MoE(config)), nnx.Param, ...)
    params, arrays = nnx.to_pure_dict(params), declared(nnx.merge(graphdef, params, rest))
    split = split_tree(mesh, params, arrays)
    placed = jax.tree.map(lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), params, split)
    shape = (SEQUENCES, tokens // SEQUENCES, WIDTH)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_split(mesh, SEQUENCES))

    def loss(params: dict, x_BTD: jax.Array) -> jax.Array:
        return (nnx.merge(graphdef, params, rest)(x_BTD)[0] ** 2).sum()

    with jax.set_mesh(mesh), sharding.exchange(exchange):
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(split, x.sharding))
        return sum(count(step.lower(placed, x).compile().as_text()).sent.values())


def in_theory(config: MoEConfig, exchange: str, tokens: int) -> float | None:
    """The bytes of rows of fp32, four times over the links: to the experts and back, and so do their gradients."""
    n, e, X = tokens // DEVICES, config.num_experts // DEVICES, DEVICES
    groups = 1 if config.capacity is None or config.capacity.group == "batch" else SEQUENCES // DEVICES
    capacity = config.expert_capacity(config.group_size(SEQUENCES, tokens // SEQUENCES))
    rows = {
        "all_to_all": config.num_experts * min(n, capacity * groups),
        "padded": X * min(n * min(config.top_k, e), 2 * n * config.top_k // X), "ring": X * n,
    }
    return None if exchange not in rows else 4 * rows[exchange] * WIDTH * 4 * (X - 1) / X


def measure(tokens: int, kind: str, num_experts: int, top_k: int) -> Row:
    """The bytes of each exchange, counted and in theory."""
    config = contract(kind, num_experts, top_k)
    names = exchanges(kind)
    return {
        "contract": kind, "E": num_experts, "K": top_k, "sent": {name: sent(config, name, tokens) for name in names},
        "theory": {name: in_theory(config, name, tokens) for name in names},
    }


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = read_options(Options, "benchmarks.exchange", __doc__, arguments)
    rows = [measure(asked.tokens, kind, *size) for kind in CONTRACTS for size in SIZES]
    if asked.json:
        about = {"tokens": asked.tokens, "devices": DEVICES, "jax": jax.__version__}
        print(json.dumps(about | {"results": rows}, indent=1))
        return 0
    print(f"KiB that each of {DEVICES} devices sends (rows alone, in theory): {asked.tokens} tokens, D={WIDTH}")
    for row in rows:
        print(f"{row['contract']}, E={row['E']}, K={row['K']}")
        for name, size in row["sent"].items():
            theory = row["theory"][name]
            print(f"  {name:12}{size / 1024:10.0f}" + (f"{f'({theory / 1024:.0f})':>10}" if theory else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
