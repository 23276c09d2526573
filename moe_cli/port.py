"""`jax-moe port`: converts a checkpoint from one form into another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jax_moe.config.checks import require
from jax_moe.disk import check_target
from jax_moe.porting.checkpoint import load_found, save, save_file
from jax_moe.porting.convert import dtype_named, port_decoder
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.open import refuse_choices
from jax_moe.porting.formats.own_folder import is_folder
from jax_moe.porting.formats.state_file import PT_SUFFIXES, SUFFIXES
from jax_moe.porting.optimizer.torch_file import layout_of, optimizer_of, write_beside
from moe_cli.arguments import Form, Port
from moe_cli.common import progress, say, say_assumed, summary, with_characters
from moe_cli.layers import opened, port_layers


def port(command: Port) -> int:
    """Reads SRC, writes DST, and prints what was written."""
    _check_places(command.src, command.dst)
    found = opened(command.src, command.layers, None if command.src.is_dir() else command.choices)
    if isinstance(found, tuple):
        return port_layers(command, *found)
    with jax.enable_x64(True):  # so that float64 files keep their dtype; nothing is computed
        if found.decoder:
            return _port_decoder(command, found)
        return _port_module(command, found) if found.optimizer is None else _port_training(command, found)


def form_of(asked: Form, source: Found, target: Path) -> Form:
    """The form of DST; `auto` is resolved as the help says."""
    if asked != "auto":
        return asked
    if source.decoder:
        return "orbax" if source.kind == "hf" and source.run is None else "hf"
    return "torch" if target.suffix in SUFFIXES else "folder"


def _port_decoder(command: Port, found: Found) -> int:
    to = form_of(command.to, found, command.dst)
    _refuse(found.folder, "a Hugging Face model", text=command.text, **command.choices.given())
    if to not in ("hf", "orbax") or command.dst.suffix in SUFFIXES:
        raise ValueError(f"{command.dst}: a Hugging Face model goes to a folder: --to must be hf or orbax")
    state, also = _optimizer_of_decoder(command, found, to)
    ported = port_decoder(
        found, command.dst, "hf" if to == "hf" else "orbax", dtype=dtype_named(command.dtype),
        max_shard_bytes=command.max_shard_bytes, overwrite=command.overwrite, allow_nonfinite=command.allow_nonfinite,
        progress=progress, say=say, also=also,
    )
    parts = [found.family.name, f"{ported.parameters:,} parameters", " and ".join(ported.dtypes)]
    if ported.files:
        kept = f" ({ported.kept} left by an interrupted port)" if ported.kept else ""
        parts.append(f"{ported.files} {'file' if ported.files == 1 else 'shards'}{kept}")
    if found.run is not None:
        parts.append(found.run.in_words())
        _say_what_a_run_keeps(found.path)
    print(f"wrote {command.dst} ({to}): {', '.join([*parts, *state])}, read back bit for bit")
    return 0


def _port_module(command: Port, found: Found) -> int:
    to = form_of(command.to, found, command.dst)
    if command.src.is_dir():
        refuse_choices(command.choices)
    if to == "hf":
        raise ValueError(f"{command.src}: is not a Hugging Face model: --to must be torch, folder or orbax")
    check_target(command.dst, command.overwrite, Path.is_file if to == "torch" else is_folder)
    if command.to == "auto" and to == "folder" and command.dst.suffix and not command.dst.is_dir():
        raise ValueError(f"{command.dst}: must end in one of {', '.join(SUFFIXES)}, or have no suffix for a folder")
    checkpoint = with_characters(load_found(found, command.allow_nonfinite, command.dtype), command.text)
    if to == "torch":
        save_file(checkpoint, command.dst, overwrite=command.overwrite)
    else:
        save(checkpoint, command.dst, overwrite=command.overwrite, storage="orbax" if to == "orbax" else "safetensors")
    say_assumed(found)
    _say_what_a_run_keeps(command.src)
    print(f"wrote {command.dst}: {summary(checkpoint)}, read back bit for bit")
    return 0


def _port_training(command: Port, found: Found) -> int:
    """Ports weights with an optimizer's state, and also prints what was left out."""
    if command.src.is_dir():
        refuse_choices(command.choices)
    to_file = command.to == "torch" or (command.to == "auto" and bool(command.dst.suffix) and not command.dst.is_dir())
    what = "weights with an optimizer's state"
    require(command.to in ("auto", "torch", "folder"), "to", command.to, f"torch or folder for {what}")
    require(command.dtype is None, "dtype", command.dtype, f"left out for {what}")
    fits = not to_file or command.dst.suffix in PT_SUFFIXES
    require(fits, "dst", str(command.dst), f"a folder, or end in {', '.join(PT_SUFFIXES)}, for {what}")
    check_target(command.dst, command.overwrite, Path.is_file if to_file else is_folder)
    checkpoint = with_characters(load_found(found, command.allow_nonfinite, with_optimizer=True), command.text)
    assert checkpoint.optimizer is not None
    write: Callable[..., None] = save_file if to_file else save
    write(checkpoint, command.dst, overwrite=command.overwrite)
    say_assumed(found)
    if checkpoint.left_out:
        say(f"left out, as they are not plain values: {', '.join(checkpoint.left_out)}")
    print(f"wrote {command.dst}: {summary(checkpoint)}, {checkpoint.optimizer.in_words()}, read back bit for bit")
    return 0


def _optimizer_of_decoder(command: Port, found: Found, to: Form) -> tuple[list[str], Callable[[Path], None]]:
    """The optimizer's state beside a Hugging Face model, in words, and a function that writes it into a folder."""
    if found.optimizer is None:
        return [], lambda part: None
    instead = f"move {found.optimizer} away to convert the weights alone"
    allowed = f"left out for weights with an optimizer's state; {instead}"
    require(command.dtype is None, "dtype", command.dtype, allowed)
    assert found.model is not None
    optimizer, model, layout = optimizer_of(found, found.model), found.model, layout_of(found)
    return [optimizer.in_words()], lambda part: write_beside(part, to, optimizer, model, layout)


def _say_what_a_run_keeps(source: Path) -> None:
    """Prints where a run of train.py keeps its optimizer's state, which is not ported."""
    if (source / "checkpoints").is_dir():
        say(f"left out: the optimizer's state in {source / 'checkpoints'}, which train.py --resume reads")


def _refuse(folder: Path, what: str, **given: Any) -> None:
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ValueError(f"{', '.join(named)}: must be left out for {what}: {folder / 'config.json'} sets it")


def _check_places(source: Path, target: Path) -> None:
    """Raises ValueError if one path lies inside the other, where writing would change what is read."""
    try:
        inner, outer = target.resolve(), source.resolve()
        folders = source.is_dir(), target.is_dir()
    except OSError as error:  # a name that the file system does not allow
        raise ValueError(f"{target}: cannot be written ({error.strerror})") from None
    if folders[0] and outer in inner.parents:
        raise ValueError(f"{target}: must not lie inside {source}")
    if folders[1] and inner in outer.parents:
        raise ValueError(f"{target}: must not hold {source}")
