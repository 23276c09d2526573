"""`jax-moe port`: a checkpoint from one form into another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jax_moe.disk import check_target
from jax_moe.porting.checkpoint import load, save
from jax_moe.porting.convert import dtype_named, port_decoder
from jax_moe.porting.formats.found import Found, find
from jax_moe.porting.formats.own_folder import is_folder
from jax_moe.porting.formats.state_file import SUFFIXES, write_state
from jax_moe.porting.training_files import holds_training
from moe_cli.arguments import Form, Port
from moe_cli.common import progress, say, say_assumed, summary, with_characters
from moe_cli.port_training import optimizer_of_decoder, port_training, say_what_a_run_keeps


def port(command: Port) -> int:
    """Reads SRC, writes DST, says what was written."""
    _check_places(command.src, command.dst)
    found = find(command.src)
    with jax.enable_x64(True):  # moves bits, computes nothing; float64 files need it
        if found.decoder:
            return _port_decoder(command, found)
        return port_training(command) if holds_training(command.src) else _port_module(command, found)


def form_of(asked: Form, source: Found, target: Path) -> Form:
    """The form that DST gets; `auto` as the help says."""
    if asked != "auto":
        return asked
    if source.decoder:
        return "orbax" if source.kind == "hf" and source.run is None else "hf"
    return "torch" if target.suffix in SUFFIXES else "folder"


def _port_decoder(command: Port, found: Found) -> int:
    to = form_of(command.to, found, command.dst)
    if found.kind == "hf":  # of a fine-tuned run the folder in it
        command = replace(command, src=found.place)
    _refuse(command, "a Hugging Face model", text=command.text, **command.choices.given())
    if to not in ("hf", "orbax") or command.dst.suffix in SUFFIXES:
        raise ValueError(f"{command.dst}: a Hugging Face model goes to a folder: --to must be hf or orbax")
    state, also = optimizer_of_decoder(command, to)
    ported = port_decoder(
        command.src, command.dst, "hf" if to == "hf" else "orbax", dtype=dtype_named(command.dtype),
        max_shard_bytes=command.max_shard_bytes, overwrite=command.overwrite, allow_nonfinite=command.allow_nonfinite,
        progress=progress, say=say, also=also,
    )
    parts = [ported.model_type, f"{ported.parameters:,} parameters", " and ".join(ported.dtypes)]
    if ported.files:
        kept = f" ({ported.kept} left by an interrupted port)" if ported.kept else ""
        parts.append(f"{ported.files} {'file' if ported.files == 1 else 'shards'}{kept}")
    if found.run is not None:
        parts.append(found.run.in_words())
        say_what_a_run_keeps(found.path)
    print(f"wrote {command.dst} ({to}): {', '.join([*parts, *state])}, read back bit for bit")
    return 0


def _port_module(command: Port, found: Found) -> int:
    to = form_of(command.to, found, command.dst)
    if to == "hf":
        raise ValueError(f"{command.src}: is no Hugging Face model: --to must be torch, folder or orbax")
    check_target(command.dst, command.overwrite, Path.is_file if to == "torch" else is_folder)
    if command.to == "auto" and to == "folder" and command.dst.suffix and not command.dst.is_dir():
        raise ValueError(f"{command.dst}: must end in one of {', '.join(SUFFIXES)}, or in nothing for a folder")
    checkpoint = load(command.src, command.choices, allow_nonfinite=command.allow_nonfinite, dtype=command.dtype)
    checkpoint = with_characters(checkpoint, command.text)
    if to == "torch":
        write_state(command.dst, checkpoint.state(), overwrite=command.overwrite)
    else:
        save(checkpoint, command.dst, overwrite=command.overwrite, storage="orbax" if to == "orbax" else "safetensors")
    say_assumed(command.src, checkpoint)
    say_what_a_run_keeps(command.src)
    print(f"wrote {command.dst}: {summary(checkpoint)}, read back bit for bit")
    return 0


def _refuse(command: Port, what: str, **given: Any) -> None:
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ValueError(f"{', '.join(named)}: must be left out for {what}, {command.src / 'config.json'} says it")


def _check_places(source: Path, target: Path) -> None:
    """Raises ValueError if one lies inside the other: writing would change what is read."""
    try:
        inner, outer = target.resolve(), source.resolve()
        folders = source.is_dir(), target.is_dir()
    except OSError as error:  # a name that the file system does not allow
        raise ValueError(f"{target}: cannot be written ({error.strerror})") from None
    if folders[0] and outer in inner.parents:
        raise ValueError(f"{target}: must not lie inside {source}")
    if folders[1] and inner in outer.parents:
        raise ValueError(f"{target}: must not hold {source}")
