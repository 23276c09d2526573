"""What would a training step of a published model cost on a TPU pod? The TPU compiler estimates it, without a TPU.

    pip install libtpu==0.0.42.1        # the version that jax's extra `tpu` names
    python -m benchmarks.tpu_train --train mixtral-8x7b --topology v5p:4x4x4 --mesh data=8,expert=8

Compiles the whole step ahead of time for every chip of a topology: forward, backward and AdamW, fp32 master weights,
bf16 products, rematerialisation, weights and optimizer split as `train.py --mesh` splits them. Prints the memory of a
chip against its HBM, operations, bytes of the collectives by kind, estimated cycles and the model FLOPs utilisation
(MFU) that they imply. These are estimates of the compiler, not measurements: cycles count each operation by itself, a
collective's at most in part.
"""

import dataclasses
import importlib.metadata
import json
import math
import re
import sys
import time
from typing import Annotated, Any, Literal
from unittest import mock

import benchmarks.without_tpu  # isort: skip  # noqa: F401  # before jax
import jax
import tyro
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from benchmarks.command import read_options
from benchmarks.hlo import count
from benchmarks.published import PUBLISHED
from benchmarks.sharded_step import training_step
from benchmarks.timing import machine
from jax_moe import sharding
from jax_moe.config.checks import check_positive_ints, require
from jax_moe.config.decoder import DecoderConfig
from jax_moe.config.exchange import Exchange
from jax_moe.parameters import declared
from jax_moe.porting.families import family_named
from jax_moe.porting.state_dict import abstract_decoder
from jax_moe.sharding.mesh import AXES, read_mesh
from moe_cli.sizes import GIB, count_parameters

MODELS = {name.lower(): values for name, (values, _, _) in PUBLISHED.items()}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU as Google's documentation has it: bytes of memory, bf16 operations a second, clock, and bytes a second that
    all of its links to other chips send.
    """

    hbm: float
    flops: float
    hertz: float
    links: float


CHIPS = {
    "v5e": Chip(16e9, 197e12, 1.5e9, 200e9), "v5p": Chip(95e9, 459e12, 1.75e9, 600e9),
    "v6e": Chip(32e9, 918e12, 1.75e9, 400e9),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Which model, on which chips."""

    train: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "mixtral-8x7b"
    """The published model, such as mixtral-8x7b, qwen3-30b-a3b or deepseek-v3."""
    topology: Annotated[str, tyro.conf.arg(metavar="CHIP:AxBxC")] = "v5p:2x2x4"
    """The chips, as TPU topologies are named."""
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = "data=16"
    """The mesh over all of them."""
    batch_size: int | None = None
    """Sequences of a step; by default one for each chip."""
    length: int = 4096
    """Tokens of a sequence."""
    layers: int | None = None
    """Another number of layers than the model's."""
    remat: Literal["none", "dots", "full"] = "full"
    """What is computed again in the backward pass."""
    exchange: Exchange = "xla"
    """How tokens get to their experts."""
    capacity: float | None = None
    """Capacity factor, in groups of 512 tokens of one-hot products; dropless (ragged) by default."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check_positive_ints(batch_size=self.batch or 1, length=self.length, layers=self.layers or 1)
        require(self.train in MODELS, "train", self.train, f"one of {', '.join(MODELS)}")
        require(self.chip in CHIPS, "topology", self.topology, f"of one of {', '.join(CHIPS)}, such as v5p:4x4x4")
        wanted, there = math.prod(read_mesh(self.mesh).values()), self.chips
        require(wanted == there, "mesh", self.mesh, f"of the {there} chips of {self.topology}")

    @property
    def chip(self) -> str:
        """The kind of chip."""
        return self.topology.partition(":")[0]

    @property
    def chips(self) -> int:
        """How many there are."""
        sizes = self.topology.partition(":")[2].split("x")
        fits = all(size.isdecimal() and int(size) > 0 for size in sizes)
        require(fits, "topology", self.topology, "a chip and its sizes, such as v5p:4x4x4")
        return math.prod(map(int, sizes))

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return self.batch_size or self.chips


def contract(options: Options) -> DecoderConfig:
    """The model's, with the dispatcher of a TPU."""
    values = dict(MODELS[options.train])
    if options.layers is not None:
        values["num_hidden_layers"] = options.layers
    config = family_named(values["model_type"]).config(values)
    moe = config.moe
    if options.capacity is not None:
        moe = moe.with_capacity(options.capacity, group="fixed", group_size=min(512, options.length))
    return config.with_moe(
        dataclasses.replace(moe, dispatcher="ragged" if options.capacity is None else "einsum")
    )


def operations(config: DecoderConfig, tokens: int, length: int) -> float:
    """Of a step, as MFU counts them: 6 for each active weight and token, and the attention's products, half of them
    beyond the causal mask. The embedding is a lookup and counts nothing.
    """
    arrays = declared(abstract_decoder(config))
    embedding = config.vocab_size * config.model_dim
    active = count_parameters(arrays, config).active - (0 if config.tied_embeddings else embedding)
    widths = 0
    for layer in config.layers:
        attention: Any = layer.attention
        key = getattr(attention, "head_dim", None) or attention.rope_dim + attention.key_dim
        value = getattr(attention, "value_dim", None) or key
        widths += attention.num_heads * (key + value)
    return tokens * (6.0 * active + 3.0 * widths * length)


def compiled_step(options: Options, config: DecoderConfig) -> Any:
    """The compiled program of the step."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    sizes = read_mesh(options.mesh)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    as_tpu = mock.patch.object(jax, "default_backend", lambda: "tpu")  # kernels are chosen by it
    with jax.set_mesh(mesh), sharding.exchange(options.exchange), as_tpu:
        step, arguments, where = training_step(config, mesh, options.batch, options.length, options.remat)
        traced = jax.jit(step, donate_argnums=0, out_shardings=where).trace(*arguments)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def report(options: Options) -> dict[str, Any]:
    """Compiles, and says what the compiler says."""
    chip, config, start = CHIPS[options.chip], contract(options), time.perf_counter()
    print(f"compiling for {options.chips} chips: minutes", file=sys.stderr, flush=True)
    compiled = compiled_step(options, config)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    counts, tokens = count(text), options.batch * options.length
    wanted = operations(config, tokens, options.length) / options.chips
    seconds = {"operations": counts.cycles / chip.hertz, "links": sum(counts.sent.values()) / chip.links}
    return {
        "options": dataclasses.asdict(options) | {"batch_size": options.batch, "layers": config.num_layers},
        "memory": {
            "state": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes, "hbm": chip.hbm,
        },
        "flops": wanted, "cycles": counts.cycles, "sent": dict(sorted(counts.sent.items())), "seconds": seconds,
        "mfu": {
            "links hidden": wanted / (max(seconds.values()) * chip.flops),
            "nothing hidden": wanted / (sum(seconds.values()) * chip.flops),
        },
        "without_cycles": counts.without + len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "compile_s": time.perf_counter() - start, "machine": machine(), "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }


def show(found: dict[str, Any]) -> None:
    """Prints it."""
    asked, seconds, mfu = found["options"], found["seconds"], found["mfu"]
    state, temporary, hbm = (found["memory"][name] / GIB for name in ("state", "temporary", "hbm"))
    print(f"{asked['train']}, {asked['layers']} layers, {asked['batch_size']} sequences of {asked['length']} tokens")
    print(f"on {asked['topology']}, mesh {asked['mesh']}, exchange {asked['exchange']}, remat {asked['remat']}, "
          f"{'dropless' if asked['capacity'] is None else 'capacity factor ' + format(asked['capacity'], 'g')}")
    fits = "fits" if state + temporary <= hbm else "does not fit"
    print(f"  memory of a chip    {state + temporary:9.1f} GiB of {hbm:.1f}, {fits}: state {state:.1f}, "
          f"temporary {temporary:.1f}")
    print(f"  model FLOPs         {found['flops']:9.3g} a chip")
    for kind, size in found["sent"].items():
        print(f"  {kind:20}{size / GIB:9.2f} GiB sent by a chip")
    print(f"  estimated cycles    {found['cycles']:9.3g}, {seconds['operations']:.2f} s; on the links at least "
          f"{seconds['links']:.2f} s")
    print(f"  without an estimate {found['without_cycles']:9} operations, of which kernels may be large")
    print(f"  MFU at most         {mfu['links hidden']:9.0%} if the links' time is hidden, "
          f"{mfu['nothing hidden']:.0%} if none is")
    print(f"compiled in {found['compile_s']:.0f} s; jax {found['jax']}, libtpu {found['libtpu']}; estimates")


def main() -> None:
    """The command."""
    options = read_options(Options, "benchmarks.tpu_train", __doc__)
    try:
        found = report(options)
    except jax.errors.JaxRuntimeError as error:
        print(f"error: {' '.join(str(error).split())[:600]}", file=sys.stderr)
        raise SystemExit(1) from None
    print(json.dumps(found, indent=1)) if options.json else show(found)


if __name__ == "__main__":
    main()
