"""`jax-moe inspect`: what is in a checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe.cli import Inspect
from jax_moe.commands.common import summary
from jax_moe.config import require
from jax_moe.decoder_config import DecoderConfig
from jax_moe.porting.about import is_folder, read_about
from jax_moe.porting.account import bytes_by_dtype, count_parameters, memory_rows, readable
from jax_moe.porting.checkpoint import load
from jax_moe.porting.decoder_folder import open_decoder
from jax_moe.porting.describe import describe
from jax_moe.porting.files import read_state
from jax_moe.porting.hf_folder import is_hf, open_folder, weight_files

DEVICES = (1, 2, 4, 8)


def inspect(command: Inspect) -> int:
    """Prints what is in a checkpoint; of a file that is no known family, its names. Status 1 if it would not load."""
    require(command.devices is None or command.devices >= 1, "devices", command.devices, "at least 1")
    if is_hf(command.path) or (is_folder(command.path) and read_about(command.path).get("family") == "decoder"):
        if command.choices.given():
            raise ValueError(f"{', '.join(command.choices.given())}: must be left out for a folder, config.json has them")
        return _inspect_decoder(command)
    fault = None
    with jax.enable_x64(True):
        try:
            checkpoint = load(command.path, command.choices, allow_nonfinite=True)
            arrays = checkpoint.weights if command.path.is_dir() else checkpoint.state()
            print("\n".join([summary(checkpoint), *describe(checkpoint.config)]))
            if checkpoint.characters is not None:
                print(f"characters: {checkpoint.characters!r}")
        except ValueError as error:
            if command.path.is_dir():
                raise
            fault, arrays = error, read_state(command.path)
    width = max(map(len, arrays), default=0)
    for name, value in arrays.items():
        note = "" if value.dtype.kind in "iub" or np.isfinite(value).all() else "  not finite"
        print(f"{name:{width}}  {value.dtype}  {list(value.shape)}{note}")
    if fault is not None:
        raise fault
    return 0


def _inspect_decoder(command: Inspect) -> int:
    """A Hugging Face model, from headers alone."""
    path = command.path
    if is_hf(path):
        with open_folder(path) as folder:
            files = weight_files(path)
            tied = ", a tied head among them that was not compared with the embedding" if folder.head else ""
            where = f"{_counted(files)}, {len(folder.stored):,} tensors (layout {folder.plan.table.name}){tied}"
            dtypes = {piece.ours: folder.headers[piece.theirs].dtype.itemsize for piece in folder.plan.pieces}
            _print(folder.model_type, folder.config, folder.shapes, dtypes, folder.stored, where, command)
        return 0
    origin, model, arrays = open_decoder(path)
    shapes = {name: one.shape for name, one in arrays.items()}
    dtypes = {name: one.dtype.itemsize for name, one in arrays.items()}
    where = f"an Orbax checkpoint, {len(arrays)} arrays"
    _print(origin.model_type, model.config, shapes, dtypes, arrays, where, command)
    return 0


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
        width = max(map(len, tensors))
        for name, one in tensors.items():
            print(f"{name:{width}}  {one.dtype}  {list(one.shape)}")


def _counted(files: list[Path]) -> str:
    size = readable(sum(file.stat().st_size for file in files))
    return f"{files[0].name}, {size}" if len(files) == 1 else f"{len(files)} files, {size}"
