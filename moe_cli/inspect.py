"""`jax-moe inspect`: what is in a checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe.config.checks import require
from jax_moe.config.decoder import DecoderConfig
from jax_moe.config.describe import describe
from jax_moe.porting.checkpoint import load
from jax_moe.porting.decoder_folder import open_decoder
from jax_moe.porting.formats.found import Found, find
from jax_moe.porting.formats.hf_folder import open_folder, weight_files
from jax_moe.porting.formats.state_file import read_state
from moe_cli.arguments import Inspect
from moe_cli.common import assumed_in_words, summary
from moe_cli.sizes import bytes_by_dtype, count_parameters, memory_rows, readable

DEVICES = (1, 2, 4, 8)


def inspect(command: Inspect) -> int:
    """Prints what is in a checkpoint; status 1 if it would not load. Of a file that is no known family, what it holds."""
    require(command.devices is None or command.devices >= 1, "devices", command.devices, "at least 1")
    found = find(command.path)
    if found.decoder:
        if command.choices.given():
            raise ValueError(f"{', '.join(command.choices.given())}: must be left out for a folder, config.json has them")
        _inspect_decoder(command, found)
        return 0
    with jax.enable_x64(True):
        try:
            checkpoint = load(command.path, command.choices, allow_nonfinite=True)
        except ValueError:
            if found.kind == "file":
                _print_arrays(read_state(command.path), command.names)
            raise
        print("\n".join([summary(checkpoint), *describe(checkpoint.config)]))
        if checkpoint.characters is not None:
            print(f"characters: {checkpoint.characters!r}")
        if checkpoint.assumed:
            print(assumed_in_words(checkpoint))
        _print_arrays(checkpoint.state() if found.kind == "file" else checkpoint.weights, command.names)
    return 0


def _print_arrays(arrays: Mapping[str, np.ndarray], names: bool) -> None:
    """How many they are and which are not finite; their names where asked for."""
    held = ", ".join(f"{readable(size)} {dtype}" for dtype, size in bytes_by_dtype(arrays.values()).items())
    print(f"tensors: {len(arrays):,}, {held}" + ("" if names else "; --names lists them"))
    bad = [name for name, value in arrays.items() if value.dtype.kind not in "iub" and not np.isfinite(value).all()]
    if bad:
        print(f"not finite: {', '.join(bad[:20])}" + (f" and {len(bad) - 20} more" if len(bad) > 20 else ""))
    if names:
        _print_names(arrays)


def _print_names(arrays: Mapping[str, Any]) -> None:
    width = max(map(len, arrays), default=0)
    for name, value in arrays.items():
        print(f"{name:{width}}  {value.dtype}  {list(value.shape)}")


def _inspect_decoder(command: Inspect, found: Found) -> None:
    """A Hugging Face model, from headers alone."""
    of_run = "" if found.run is None else f"{found.run.in_words()}; "
    if found.kind == "hf":
        with open_folder(found.place) as folder:
            files = weight_files(found.place)
            tied = ", a tied head among them that was not compared with the embedding" if folder.head else ""
            layout = f"layout {folder.plan.table.name}" + (f", {folder.note}" if folder.note else "")
            where = f"{of_run}{_counted(files)}, {len(folder.stored):,} tensors ({layout}){tied}"
            dtypes = {piece.ours: folder.headers[piece.theirs].dtype.itemsize for piece in folder.plan.pieces}
            _print(folder.model_type, folder.config, folder.shapes, dtypes, folder.stored, where, command)
        return
    origin, model, arrays = open_decoder(command.path)
    shapes = {name: one.shape for name, one in arrays.items()}
    dtypes = {name: one.dtype.itemsize for name, one in arrays.items()}
    where = f"{of_run}an Orbax checkpoint, {len(arrays)} arrays"
    _print(origin.model_type, model.config, shapes, dtypes, arrays, where, command)


def _print(
    model_type: str, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], itemsizes: Mapping[str, int],
    tensors: Mapping[str, Any], where: str, command: Inspect,
) -> None:
    counts = count_parameters(shapes, config)
    held = bytes_by_dtype(tensors.values())
    print(f"{model_type}, {counts.total:,} parameters, {counts.active:,} of them active for a token")
    print(
        f"  active: all but the {config.moe.num_experts - config.moe.top_k} of {config.moe.num_experts} experts a layer that "
        "the token is not sent to; embedding and head counted whole"
    )
    print(f"files: {where}; " + ", ".join(f"{readable(size)} {dtype}" for dtype, size in held.items()))
    print("\n".join(describe(config)))
    stored = {name: math.prod(shape) * itemsizes[name] for name, shape in shapes.items()}
    experts = sum(size for name, size in stored.items() if name.startswith("moe.experts."))
    devices = DEVICES if command.devices is None else (command.devices,)
    rows = memory_rows(counts, sum(stored.values()), experts, config, devices)
    print(f"{'memory a device, of N =':30}" + "".join(f"{n:>12,}" for n in devices))
    for what, sizes in rows.items():
        print(f"  {what:28}" + "".join(f"{readable(size):>12}" for size in sizes))
    print("  weights as stored; training in fp32 with AdamW, 16 bytes a parameter (weight, gradient, two moments);")
    print("  split: every device has its share of each layer's experts and all else; activations and caches come on top")
    if command.names:
        _print_names(tensors)


def _counted(files: list[Path]) -> str:
    size = readable(sum(file.stat().st_size for file in files))
    return f"{files[0].name}, {size}" if len(files) == 1 else f"{len(files)} files, {size}"
