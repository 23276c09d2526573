"""What would a Mixtral layer cost on a TPU? Asked of the TPU compiler itself, on a machine without one.

    pip install libtpu==0.0.42.1        # the version that jax's extra `tpu` names
    python -m benchmarks.tpu_compile [--chips v5e,v5p,v6e] [--tokens 8192] [--size D,F,E,K] [--only NAME,...] [--json]

Compiles forward with backward of one layer in bf16 for one chip, for every dispatcher, and of a dense FFN with the same active
FLOPs; prints the compiler's own estimated cycles as a ratio to the dense FFN's, the bytes accessed and the temporary memory.
Estimates, not measurements. The body of a loop counts as often as the compiler knows that it runs, else once; custom calls
report no cycles, and their number is printed. Raises if a program does not fit the chip's memory (then the row says so).
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

# before jax starts: no TPU is to be looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jax_moe
from benchmarks.timing import machine
from jax_moe.config.moe import MoEConfig

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GROUPS = (256, 512, 1024, 2048)


def contracts(config: MoEConfig) -> dict[str, MoEConfig]:
    """Every dispatcher; the capacity ones at factor 1.0, the one-hot one in groups of several sizes."""
    found = {"ragged, dropless": dataclasses.replace(config, dispatcher="ragged")}
    found["gather, one group"] = dataclasses.replace(config.with_capacity(1.0, group="batch"), dispatcher="gather")
    for size in GROUPS:
        grouped = config.with_capacity(1.0, group="fixed", group_size=size)
        for name in ("gather", "einsum"):
            found[f"{name}, groups of {size}"] = dataclasses.replace(grouped, dispatcher=name)  # type: ignore[arg-type]
    return found


def layer_program(config: MoEConfig) -> tuple[Callable, Any]:
    """(a weighted sum of the answer with its gradients, the abstract parameters)."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: jax_moe.MoE(config, param_dtype=jnp.bfloat16)))

    def loss(params: Any, x: jax.Array, probe: jax.Array) -> jax.Array:
        return (nnx.merge(graphdef, params)(x)[0] * probe).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1)), params


def dense_program(config: MoEConfig) -> tuple[Callable, Any]:
    """The limit: one expert."""
    D, F = config.model_dim, config.expert_dim
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}

    def loss(params: dict, x: jax.Array, probe: jax.Array) -> jax.Array:
        y = (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]
        return (y * probe).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1)), {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes.items()}


def cost(program: Callable, params: Any, num_tokens: int, width: int, device: Any) -> dict[str, Any]:
    """Cycles, bytes and memory of the program compiled for one chip."""
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
        "cycles": cycles(text), "bytes_accessed": analysis.get("bytes accessed"), "compile_s": time.perf_counter() - start,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,  # type: ignore[union-attr]
        "custom_calls": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
    }


def cycles(text: str) -> int:
    """Estimated cycles of the entry computation, bodies of loops times their trip count."""
    own: dict[str, int] = {}
    loops: dict[str, list[tuple[str, int]]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = head[2]
            entry = name if head[1] else entry
        found = re.search(r'"estimated_cycles":"?(\d+)', line)
        own[name] = own.get(name, 0) + (int(found[1]) if found else 0)
        body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
        if body:
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            loops.setdefault(name, []).append((body[1], int(count[1]) if count else 1))

    def total(computation: str) -> int:
        return own.get(computation, 0) + sum(times * total(body) for body, times in loops.get(computation, []))

    return total(entry)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_compile", description=__doc__.split("\n")[0])
    parser.add_argument("--chips", default="v5e,v5p,v6e")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--size", default="4096,14336,8,2", help="D,F,E,K; Mixtral-8x7B by default")
    parser.add_argument("--only", help="rows, by semicolons; the dense FFN always runs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    D, F, E, K = map(int, arguments.size.split(","))
    config = jax_moe.presets.mixtral(D, F, E, K)
    chosen = contracts(config)
    if arguments.only:
        chosen = {name: chosen[name] for name in arguments.only.split(";")}
    results: dict[str, Any] = {}
    for chip in arguments.chips.split(","):
        device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
        dense = cost(*dense_program(config), num_tokens=K * arguments.tokens, width=D, device=device)
        rows = results[chip] = {"dense FFN": dense}
        for name, contract in chosen.items():
            print(f"{chip}: {name}", file=sys.stderr)
            rows[name] = cost(*layer_program(contract), num_tokens=arguments.tokens, width=D, device=device)
        for row in rows.values():
            row["ratio"] = row["cycles"] / dense["cycles"] if "cycles" in row else None
    about = {"tokens": arguments.tokens, "size": arguments.size, "machine": machine(), "libtpu": _libtpu(), "results": results}
    if arguments.json:
        print(json.dumps(about, indent=1))
        return
    for chip, rows in results.items():
        print(f"\n{chip}, T={arguments.tokens}, D,F,E,K={arguments.size}, bf16, forward and backward, estimated by the compiler")
        print(f"{'':24}{'cycles':>12}{'/ dense':>9}{'GB accessed':>13}{'GB temporary':>14}{'custom calls':>14}")
        for name, row in rows.items():
            if "error" in row:
                print(f"{name:24}  {row['error']}")
                continue
            print(f"{name:24}{row['cycles']:12,}{row['ratio']:9.2f}{row['bytes_accessed'] / 1e9:13.1f}"
                  f"{row['temporary_bytes'] / 1e9:14.2f}{row['custom_calls']:14}")
    print(f"\n{about['machine']}, libtpu {about['libtpu']}")


def _libtpu() -> str:
    import importlib.metadata

    return importlib.metadata.version("libtpu")


if __name__ == "__main__":
    main()
