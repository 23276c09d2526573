"""How does cost grow with the number of experts, of tokens and of layers?

    python -m benchmarks.scaling [--only experts,tokens,layers,mesh] [--rounds 9] [--json]

experts: a layer with 128 experts against the same layer with 8, top-8, equal active FLOPs. tokens: 4096 against 2048
tokens, 64 experts, top-8. Both time forward with backward of a dropless Mixtral layer, in turn in one process. layers:
compile time of a training step (AdamW) with 64 layers against 8, of a small Mixtral and of makeMoE, from tracing to the
program, each time with empty caches. mesh: the same of a small Mixtral on data=2,expert=4, for which eight devices are
needed (XLA_FLAGS=--xla_force_host_platform_device_count=8). Prints medians and their ratio beside the wanted ratio; the
exit status is 0 either way.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import jax_moe
from benchmarks import sharded_step
from benchmarks.command import read_names, read_options
from benchmarks.layer_contestants import layer
from benchmarks.shapes import Shape
from benchmarks.timing import alternate, device, machine, median_ratio
from jax_moe import sharding
from jax_moe.config.checks import check_positive_ints

PAIRS = {
    "experts": [("128 experts", Shape(T, D, F, 128, 8), "8 experts", Shape(T, D, F, 8, 8))
                for T, D, F in ((2048, 256, 128), (4096, 512, 256))],
    "tokens": [("4096 tokens", Shape(4096, D, F, 64, 8), "2048 tokens", Shape(2048, D, F, 64, 8))
               for D, F in ((256, 128), (512, 256))],
}
WANTED = {"experts": 1.3, "tokens": 2.1, "layers": 1.3, "mesh": 1.3}
MESH = {"data": 2, "expert": 4}
DEEP, SHALLOW, COMPILES = 64, 8, 3
BATCH, BLOCK = 4, 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Which questions, and how often."""

    only: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME")] = None
    """Of experts, tokens, layers, mesh; by default all, mesh where there are eight devices."""
    rounds: int = 9
    """Timed calls of each layer; programs are compiled three times."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)
        _ = self.questions  # raises ValueError for an unknown name

    @property
    def questions(self) -> set[str]:
        """The questions to answer."""
        return read_names("only", self.only, WANTED) or set(WANTED)


def compare_layers(question: str, large: str, large_shape: Shape, small: str, small_shape: Shape, rounds: int) -> Row:
    """Times forward with backward of two shapes in turn."""
    runs = {name: layer(shape, shape.numbers("float32"), "auto").both
            for name, shape in ((large, large_shape), (small, small_shape))}
    where = f"layer D={large_shape.D} F={large_shape.F}"
    return _row(question, f"{where}, {large} / {small}", alternate(runs, rounds, warmup=2), large, small)


def _row(question: str, what: str, seconds: dict[str, list[float]], large: str, small: str) -> Row:
    return {
        "question": question, "what": what, "large_ms": 1e3 * statistics.median(seconds[large]),
        "small_ms": 1e3 * statistics.median(seconds[small]), "ratio": median_ratio(seconds, large, small),
        "wanted": WANTED[question], "rounds": len(seconds[large]),
    }


def small_mixtral(num_layers: int) -> jax_moe.DecoderConfig:
    """The contract of a small Mixtral."""
    return jax_moe.DecoderConfig.grouped(
        vocab_size=512, model_dim=256, num_layers=num_layers, num_heads=8, num_kv_heads=4, head_dim=32,
        moe=jax_moe.presets.mixtral(256, 512, 8, 2),
    )


def mixtral(num_layers: int) -> jax_moe.Decoder:
    """A small Mixtral; `nnx.eval_shape` makes it without numbers."""
    return jax_moe.Decoder(small_mixtral(num_layers), rngs=nnx.Rngs(0))


def makemoe(num_layers: int) -> jax_moe.MakeMoE:
    """makeMoE in the published sizes, with another depth."""
    return jax_moe.MakeMoE(jax_moe.MakeMoEConfig(num_layers=num_layers, block_size=BLOCK), rngs=nnx.Rngs(0))


def training_step(make: Callable[[], Any]) -> tuple[Callable, tuple]:
    """(a training step of AdamW with dropout and noise, its abstract arguments)."""
    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    optimizer = jax_moe.adamw_as_torch(1e-3)

    def loss_of(params: dict, tokens_BT1: jax.Array, key: jax.Array) -> jax.Array:
        logits_BTV = nnx.merge(graphdef, params, rest)(tokens_BT1[:, :-1], key=key, training=True)
        return jax_moe.next_token_loss(logits_BTV, tokens_BT1[:, 1:])

    def step(params: dict, state: optax.OptState, tokens_BT1: jax.Array, key: jax.Array) -> tuple:
        loss, gradient = jax.value_and_grad(loss_of)(params, tokens_BT1, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    tokens = jax.ShapeDtypeStruct((BATCH, BLOCK + 1), jnp.int32)
    return step, (params, jax.eval_shape(optimizer.init, params), tokens, jax.eval_shape(lambda: jax.random.key(0)))


def compile_anew(step: Callable, arguments: tuple) -> None:
    """Compiles from tracing to the program, with empty caches."""
    jax.clear_caches()
    jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


def compare_depths(name: str, make: Callable[[int], Any], deep: int = DEEP, shallow: int = SHALLOW) -> Row:
    """Times compiling two depths in turn; the first round warms up the process."""
    runs = {str(depth): partial(compile_anew, *training_step(partial(make, depth))) for depth in (deep, shallow)}
    seconds = alternate(runs, COMPILES, warmup=1)
    return _row("layers", f"compiling {name}, {deep} / {shallow} layers", seconds, str(deep), str(shallow))


def compare_depths_on_mesh(deep: int = DEEP, shallow: int = SHALLOW) -> Row:
    """`compare_depths` of a small Mixtral on the mesh, whose tokens are exchanged."""
    mesh = sharding.device_mesh(MESH)

    def compile_depth(num_layers: int) -> None:
        jax.clear_caches()
        with jax.set_mesh(mesh), sharding.exchange("auto"):
            step, arguments, where = sharded_step.training_step(small_mixtral(num_layers), mesh, 8, BLOCK, "none")
            jax.jit(step, donate_argnums=0, out_shardings=where).lower(*arguments).compile()

    runs = {str(depth): partial(compile_depth, depth) for depth in (deep, shallow)}
    what = f"compiling a small Mixtral on {','.join(f'{k}={n}' for k, n in MESH.items())}, {deep} / {shallow} layers"
    return _row("mesh", what, alternate(runs, COMPILES, warmup=1), str(deep), str(shallow))


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    asked = read_options(Options, "benchmarks.scaling", __doc__, arguments)
    jax.config.update("jax_enable_compilation_cache", False)
    devices, needed = jax.device_count(), math.prod(MESH.values())
    if asked.only and "mesh" in asked.questions and devices < needed:
        flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        print(f"only='mesh': must be left out with {devices} device{'s' * (devices > 1)} ({flag})", file=sys.stderr)
        return 2
    pairs = [(question, pair) for question in PAIRS if question in asked.questions for pair in PAIRS[question]]
    rows = [compare_layers(question, *pair, asked.rounds) for question, pair in pairs]
    if "layers" in asked.questions:
        rows += [compare_depths(name, make) for name, make in (("a small Mixtral", mixtral), ("makeMoE", makemoe))]
    if "mesh" in asked.questions and devices >= needed:
        rows.append(compare_depths_on_mesh())
    about = device() | machine()
    if asked.json:
        print(json.dumps({"machine": about, "results": rows}, indent=1))
        return 0
    print(f"{'':64}{'large':>12}{'small':>13}{'ratio':>8}{'wanted':>10}")
    for row in rows:
        times = f"{row['large_ms']:9.1f} ms{row['small_ms']:10.1f} ms"
        print(f"{row['what']:64}{times}{row['ratio']:8.2f}{'<= ' + str(row['wanted']):>10}")
    print(about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
