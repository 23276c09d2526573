"""`jax-moe inspect`: prints what a checkpoint holds."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jax_moe.config.checks import require
from jax_moe.config.describe import describe
from jax_moe.config.models import Origin
from jax_moe.guarded import parse_json, read_text_and_object
from jax_moe.parameters import declared
from jax_moe.porting.checkpoint import load_found
from jax_moe.porting.families import family_named
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.hf_folder import weight_files
from jax_moe.porting.formats.quantised import computed_dtype, read_scheme
from jax_moe.porting.formats.state_file import read_state
from jax_moe.porting.state_dict import abstract_decoder
from jax_moe.sharding.mesh import read_mesh
from moe_cli.arguments import Inspect
from moe_cli.common import assumed_in_words, summary
from moe_cli.layers import inspect_layers, opened
from moe_cli.sizes import (
    Parameters,
    bytes_by_dtype,
    count_parameters,
    memory_on_mesh,
    memory_rows,
    name_lines,
    readable,
    stored_in_words,
)

DEVICES = (1, 2, 4, 8)


def inspect(command: Inspect) -> int:
    """Prints what a checkpoint holds. Of a file of no known family, prints its tensors and raises ValueError."""
    require(command.devices is None or command.devices >= 1, "devices", command.devices, "at least 1")
    require(command.mesh is None or command.devices is None, "devices", command.devices, "left out with --mesh")
    if command.mesh is not None:
        read_mesh(command.mesh)
    if command.path.suffix == ".json" and command.path.is_file():
        _print_config(command)
        return 0
    try:
        found = opened(command.path, command.layers, command.choices)
        for name in ("devices", "mesh"):
            whole = not isinstance(found, tuple) and found.decoder
            allowed = "left out: the memory on devices is printed of a whole Hugging Face model"
            require(whole or getattr(command, name) is None, name, getattr(command, name), allowed)
        if isinstance(found, tuple):
            return inspect_layers(command, *found)
        if found.decoder:
            _inspect_decoder(command, found)
            return 0
        with jax.enable_x64(True):
            checkpoint = load_found(found, allow_nonfinite=True)
            print("\n".join([summary(checkpoint), *describe(checkpoint.config)]))
            if checkpoint.characters is not None:
                print(f"characters: {checkpoint.characters!r}")
            if checkpoint.assumed:
                print(assumed_in_words(found))
            _print_arrays(checkpoint.state() if found.kind == "file" else checkpoint.weights, command.names)
    except ValueError:
        if not command.path.is_dir():
            _print_arrays(read_state(command.path), command.names)
        raise
    return 0


def _print_arrays(arrays: Mapping[str, np.ndarray], names: bool) -> None:
    """Prints the number of arrays, their sizes and those that are not finite; with `names` also their names."""
    held = ", ".join(f"{readable(size)} {dtype}" for dtype, size in bytes_by_dtype(arrays.values()).items())
    print(f"tensors: {len(arrays):,}, {held}" + ("" if names else "; --names lists them"))
    bad = [name for name, value in arrays.items() if value.dtype.kind not in "iub" and not np.isfinite(value).all()]
    if bad:
        print(f"not finite: {', '.join(bad[:20])}" + (f" and {len(bad) - 20} more" if len(bad) > 20 else ""))
    if names:
        print("\n".join(name_lines(arrays)))


def _inspect_decoder(command: Inspect, found: Found) -> None:
    """Prints a Hugging Face model by its headers alone."""
    of_run = "" if found.run is None else f"{found.run.in_words()}; "
    if found.kind == "hf":
        assert found.plan is not None
        tied = ", among them a tied head that was not compared with the embedding" if found.head else ""
        layout = f"layout {found.plan.table.name}" + (f", {found.note}" if found.note else "")
        where = f"{of_run}{_counted(weight_files(found.place))}, {len(found.stored):,} tensors ({layout}){tied}"
        dtypes = {piece.ours: found.tensors[piece.theirs].dtype.itemsize for piece in found.plan.pieces}
    else:
        where = f"{of_run}an Orbax checkpoint, {len(found.tensors)} arrays"
        dtypes = {name: array.dtype.itemsize for name, array in found.tensors.items()}
    _print(found, dtypes, where, command)


def _print_config(command: Inspect) -> None:
    """Prints the model that a config.json describes, without its weights."""
    text, values = read_text_and_object(command.path)
    try:
        scheme = read_scheme(values)
        family = family_named(values.get("model_type"))
        config, dtype = family.config(values), computed_dtype(values)
    except ValueError as error:
        raise ValueError(f"{command.path}: {error}") from None
    origin = Origin(model_type=family.name, config_json=text, directory=str(command.path.parent.absolute()))
    model = abstract_decoder(config, origin)
    found = Found(
        path=command.path, kind="hf", place=command.path, family=family, config=config, tensors={}, ours=False,
        origin=origin, model=model, quantised=None if scheme is None else scheme.words,
    )
    sizes = dict.fromkeys(declared(model), dtype.itemsize)
    _print(found, sizes, f"none, this is the config.json alone; weights counted as {dtype}", command)


def _print(found: Found, itemsizes: Mapping[str, int], where: str, command: Inspect) -> None:
    config, tensors, arrays = found.config, found.stored, declared(found.model)
    counts = count_parameters(arrays, config)
    print(f"{found.family.name}, {counts.total:,} parameters, {counts.active:,} of them active for a token")
    print(
        f"  active: all but the {config.moe.num_networks - config.moe.top_k} of {config.moe.num_networks} experts in "
        "each layer that a token is not sent to; embedding and head count in full"
    )
    held = f"; {stored_in_words(tensors.values(), found.quantised)}" if tensors else ""
    print(f"files: {where}{held}")
    carried = () if found.origin is None else found.origin.carried
    if carried:
        nested = found.family.is_nested(parse_json(found.origin.config_json, "config.json"))  # type: ignore[union-attr]
        whose = "of the models around the text model" if nested else "that predict further tokens"
        print(f"carried: {len(carried)} tensors {whose}; not used here, kept on saving")
    print("\n".join(describe(config)))
    _print_memory(found, itemsizes, counts, command)
    if command.names:
        print("\n".join(name_lines(tensors)))


def _print_memory(found: Found, itemsizes: Mapping[str, int], counts: Parameters, command: Inspect) -> None:
    """Prints what each device holds: on a mesh, or on N devices with and without the experts split."""
    config, arrays = found.config, declared(found.model)
    kept = "computed" if found.quantised else "stored"
    training = "training in fp32 with AdamW, 16 bytes per parameter (weight, gradient, two moments)"
    if command.mesh is not None:
        print(f"memory per device, on the mesh {command.mesh}")
        for what, size in memory_on_mesh(arrays, itemsizes, read_mesh(command.mesh)).items():
            print(f"  {what:28} {readable(size):>11}")
        print(f"  weights as {kept}; {training};")
        print("  activations, caches and the layer that is put together for its use are extra")
        return
    stored = {name: math.prod(array.shape) * itemsizes[name] for name, array in arrays.items()}
    experts = sum(size for name, size in stored.items() if arrays[name].role == "expert")
    devices = DEVICES if command.devices is None else (command.devices,)
    rows = memory_rows(counts, sum(stored.values()), experts, config, devices)
    print(f"{'memory per device, for N =':30}" + "".join(f"{n:>12,}" for n in devices))
    for what, sizes in rows.items():
        print(f"  {what:28}" + "".join(f" {readable(size):>11}" for size in sizes))
    print(f"  weights as {kept}; {training};")
    print("  split: each device has its share of every layer's experts, and all else; activations and caches are extra")


def _counted(files: list[Path]) -> str:
    size = readable(sum(file.stat().st_size for file in files))
    return f"{files[0].name}, {size}" if len(files) == 1 else f"{len(files)} files, {size}"
