"""What would a Mixtral layer cost on a TPU? The TPU compiler estimates it, on a machine without a TPU.

    pip install libtpu==0.0.42.1        # the version that jax's extra `tpu` names
    python -m benchmarks.tpu_compile [--chips v5e,v5p,v6e] [--tokens 8192] [--size D,F,E,K] [--only NAME;...] [--json]

Compiles forward with backward of one layer in bf16 for one chip with every dispatcher, and a dense FFN with the same
active FLOPs. Prints the compiler's estimated cycles as a ratio to the dense FFN's, the bytes accessed and the temporary
memory. These are estimates, not measurements: custom calls report no cycles, and their number is printed. If a program
does not fit the chip's memory, its row says so.

With --train MODEL it compiles the whole training step of a published model for a pod: benchmarks/tpu_train.py.
"""

import dataclasses
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any
from unittest import mock

import benchmarks.without_tpu  # isort: skip  # noqa: F401  # before jax
import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jax_moe
from benchmarks.command import read_names, read_options
from benchmarks.hlo import count
from benchmarks.timing import machine
from jax_moe.config.checks import check_positive_ints, require
from jax_moe.config.moe import MoEConfig
from jax_moe.kernels import megablox

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GROUPS = (256, 512, 1024, 2048)
XLA_ROW, KERNEL_ROW = "ragged_dot, dropless", "kernels, dropless"


@dataclasses.dataclass(frozen=True)
class Options:
    """Which chips, layer and dispatchers."""

    chips: Annotated[str, tyro.conf.arg(metavar="NAME,NAME")] = "v5e,v5p,v6e"
    """Chips to compile for."""
    tokens: int = 8192
    """Tokens of a batch."""
    size: Annotated[str, tyro.conf.arg(metavar="D,F,E,K")] = "4096,14336,8,2"
    """Model width, expert width, experts, choices per token; Mixtral-8x7B by default."""
    only: Annotated[str | None, tyro.conf.arg(metavar="NAME;NAME")] = None
    """Rows of the table, separated by semicolons; the dense FFN is always compiled."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        check_positive_ints(tokens=self.tokens)
        read_names("chips", self.chips, TOPOLOGIES)
        whole = [size.isdecimal() and int(size) > 0 for size in self.size.split(",")]
        require(whole == [True] * 4, "size", self.size, "D,F,E,K, four integers of at least 1")
        _ = self.contracts  # raises ValueError for an unknown row

    @property
    def config(self) -> MoEConfig:
        """The layer's contract."""
        return jax_moe.presets.mixtral(*map(int, self.size.split(",")))

    @property
    def contracts(self) -> dict[str, MoEConfig]:
        """{row: contract} of the rows to compile."""
        found = contracts(self.config)
        chosen = list(found) if self.only is None else self.only.split(";")
        for name in chosen:
            require(name in found, "only", name, f"one of {'; '.join(found)}")
        return {name: found[name] for name in chosen}


def contracts(config: MoEConfig) -> dict[str, MoEConfig]:
    """{row: contract} of every dispatcher; einsum and gather at capacity factor 1.0, in groups of several sizes."""
    found = {name: dataclasses.replace(config, dispatcher="ragged") for name in (XLA_ROW, KERNEL_ROW)}
    found["gather, one group"] = dataclasses.replace(config.with_capacity(1.0, group="batch"), dispatcher="gather")
    for size in GROUPS:
        grouped = config.with_capacity(1.0, group="fixed", group_size=size)
        for name in ("gather", "einsum"):
            found[f"{name}, groups of {size}"] = dataclasses.replace(grouped, dispatcher=name)  # type: ignore[arg-type]
    return found


def layer_program(config: MoEConfig) -> tuple[Callable, Any]:
    """(a function of the weighted sum of the answer and its gradients, the abstract parameters)."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: jax_moe.MoE(config, param_dtype=jnp.bfloat16)))

    def loss(params: Any, x: jax.Array, probe: jax.Array) -> jax.Array:
        return (nnx.merge(graphdef, params)(x)[0] * probe).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1)), params


def dense_program(config: MoEConfig) -> tuple[Callable, Any]:
    """The dense FFN: the same for one expert."""
    D, F = config.model_dim, config.expert_dim
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}

    def loss(params: dict, x: jax.Array, probe: jax.Array) -> jax.Array:
        y = (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]
        return (y * probe).astype(jnp.float32).sum()

    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    return jax.value_and_grad(loss, argnums=(0, 1)), params


def cost(program: Callable, params: Any, num_tokens: int, width: int, device: Any) -> dict[str, Any]:
    """Cycles, bytes and memory of the program compiled for one chip; or the compiler's error."""
    here = SingleDeviceSharding(device)
    params, x = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here),
        (params, jax.ShapeDtypeStruct((1, num_tokens, width), jnp.bfloat16)),
    )
    start = time.perf_counter()
    try:
        compiled = jax.jit(program).trace(params, x, x).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0][:160]}
    text = compiled.as_text()
    assert text is not None
    analysis = compiled.cost_analysis()
    return {
        "cycles": count(text).cycles, "bytes_accessed": analysis.get("bytes accessed"),
        "compile_s": time.perf_counter() - start,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
        "custom_calls": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
    }


def compile_rows(options: Options, chip: str) -> dict[str, dict[str, Any]]:
    """{row: costs and their ratio to the dense FFN} for one chip; progress goes to stderr."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    config = options.config
    width, num_tokens = config.model_dim, options.tokens
    dense = cost(*dense_program(config), num_tokens=config.top_k * num_tokens, width=width, device=device)
    rows = {"dense FFN": dense}
    for name, contract in options.contracts.items():
        print(f"{chip}: {name}", file=sys.stderr)
        backend = "tpu" if name == KERNEL_ROW else "cpu"  # where the layer takes the kernels that jax ships for TPU
        with mock.patch.object(jax, "default_backend", lambda: backend):  # noqa: B023
            rows[name] = cost(*layer_program(contract), num_tokens=num_tokens, width=width, device=device)
        if name == KERNEL_ROW and "error" not in rows[name]:
            rows[name]["products"] = products_of_grid(config, num_tokens)
    for row in rows.values():
        row["ratio"] = row["cycles"] / dense["cycles"] if "cycles" in row else None
    return rows


def products_of_grid(config: MoEConfig, num_tokens: int) -> float:
    """Operations of the kernels' nine products over those of the dense FFN, if experts share the rows evenly.

    Counted from the kernels' own grids: a tile for each block of rows and expert that meet, at most E - 1 more than
    blocks, and columns rounded up to whole tiles.
    """
    R, E = num_tokens * config.top_k, config.num_networks
    tm, td, tf = megablox.tiles(R, config.model_dim, config.expert_dim)
    D, F = config.model_dim, config.expert_dim
    return (-(-R // tm) + E - 1) * tm / R * (-(-D // td) * td / D) * (-(-F // tf) * tf / F)


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Prints the table of one chip."""
    print(f"{'':24}{'cycles':>12}{'/ dense':>9}{'GB accessed':>13}{'GB temporary':>14}{'custom calls':>14}")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:24}  {row['error']}")
            continue
        print(f"{name:24}{row['cycles']:12,}{row['ratio']:9.2f}{row['bytes_accessed'] / 1e9:13.1f}"
              f"{row['temporary_bytes'] / 1e9:14.2f}{row['custom_calls']:14}"
              + (f"  products {row['products']:.2f} / dense, from the grids" if "products" in row else ""))


def main() -> None:
    """The command."""
    if any(word.split("=")[0] == "--train" for word in sys.argv[1:]):
        from benchmarks.tpu_train import main as train

        return train()
    options = read_options(Options, "benchmarks.tpu_compile", __doc__)
    results = {chip: compile_rows(options, chip) for chip in options.chips.split(",")}
    about = {
        "tokens": options.tokens, "size": options.size, "machine": machine(),
        "libtpu": importlib.metadata.version("libtpu"), "results": results,
    }
    if options.json:
        print(json.dumps(about, indent=1))
        return
    for chip, rows in results.items():
        sizes = f"T={options.tokens}, D,F,E,K={options.size}"
        print(f"\n{chip}, {sizes}, bf16, forward and backward, estimated by the compiler")
        show(rows)
    print(f"\n{about['machine']}, libtpu {about['libtpu']}")


if __name__ == "__main__":
    main()
