"""A Hugging Face model copied between its folder and an Orbax checkpoint, tensor by tensor, without building it."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jax_moe.config.checks import require
from jax_moe.config.models import Origin
from jax_moe.disk import check_target, writing
from jax_moe.guarded import parse_json
from jax_moe.parameters import declared
from jax_moe.porting.formats.carried import carried_by, placed, write_carried
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.hf_folder import check_head, config_text, copy_others, is_hf
from jax_moe.porting.formats.orbax import verify_orbax, write_orbax
from jax_moe.porting.formats.own_folder import DECODER, about_folder, is_folder, write_about
from jax_moe.porting.formats.resumable import Advance, Readings, identity, resumable, room_for, write_shards
from jax_moe.porting.formats.shards import plan_shards
from jax_moe.porting.table.arrays import theirs_from
from jax_moe.porting.table.plan import Piece, Plan, assemble, make_plan, their_names
from jax_moe.porting.tensors import DTYPES, Header
from jax_moe.stored import kept_paths

Progress = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Source:
    """A model to copy, with the tensors to write."""

    found: Found
    origin: Origin  # with the text of the new config.json
    plan: Plan
    tensors: dict[str, Header]


@dataclass(frozen=True)
class Ported:
    """What was written."""

    parameters: int
    dtypes: list[str]
    files: int  # shards; 0: none
    kept: int  # shards left by an interrupted port


def port_decoder(
    found: Found, target: Path, to: Literal["hf", "orbax"], *, dtype: np.dtype | None, max_shard_bytes: int,
    overwrite: bool, allow_nonfinite: bool, progress: Progress, say: Callable[[str], None],
    also: Callable[[Path], None] = lambda part: None,
) -> Ported:
    """Ports a decoder from either form into either, verified bit for bit before the result is renamed to `target`.

    `also` writes further files into the new folder. Between Hugging Face folders one tensor is in memory at a time; to
    and from Orbax all tensors are. An interrupted port to a Hugging Face folder is resumed.
    """
    require(max_shard_bytes >= 1, "max_shard_bytes", max_shard_bytes, "at least 1")
    origin, model = found.origin, found.model
    assert origin is not None and model is not None
    if found.note is not None:
        say(f"{found.folder}: {found.note}")
    check_head(found)
    plan = found.plan or make_plan(found.family.on_disk(found.config), declared(model))
    names = kept_paths(model) if found.ours else their_names(plan, kept_paths(model))
    read = Readings(found.stored, dtype, allow_nonfinite, str(found.folder), names).converted()
    if dtype is not None:
        values = parse_json(origin.config_json, found.path)
        origin = replace(origin, config_json=config_text(origin.config_json, values, dtype))
    write = _write_hf if to == "hf" else _write_orbax
    files, kept = write(Source(found, origin, plan, read), target, max_shard_bytes, overwrite, progress, say, also)
    elements = sum(math.prod(shape) for shape in plan.our_shapes.values())
    return Ported(elements, sorted({header.dtype.name for header in read.values()}), files, kept)


def replaceable(path: Path) -> bool:
    """Whether a folder is a checkpoint of either form."""
    return is_hf(path) or is_folder(path)


def _write_hf(
    source: Source, target: Path, max_shard_bytes: int, overwrite: bool, progress: Progress, say: Callable[[str], None],
    also: Callable[[Path], None],
) -> tuple[int, int]:
    tensors = _theirs(source.plan, source.tensors) if source.found.ours else source.tensors
    values = parse_json(source.origin.config_json, source.found.path)
    tensors = placed(source.found.family, values, tensors) | carried_by(source.origin)
    shards, total = plan_shards(tensors, max_shard_bytes), sum(header.nbytes for header in tensors.values())
    check_target(target, overwrite, replaceable)
    room_for(target, total)
    dtypes = {name: header.dtype.name for name, header in tensors.items()}
    note = {"source": identity(source.found.folder), "dtypes": dtypes, "shards": shards}
    with (
        resumable(target, overwrite, replaceable, note, say) as part,
        progress(f"writing {target.name}", total) as advance,
    ):
        kept = write_shards(part, tensors, shards, advance)
        (part / "config.json").write_text(source.origin.config_json, encoding="utf-8")
        copy_others(Path(source.origin.directory), part)
        also(part)
    return len(shards), kept


def _write_orbax(
    source: Source, target: Path, _max_shard_bytes: int, overwrite: bool, progress: Progress,
    _say: Callable[[str], None], also: Callable[[Path], None],
) -> tuple[int, int]:
    tensors = source.tensors if source.found.ours else _ours(source.plan, source.tensors)
    total = sum(header.nbytes for header in tensors.values())
    check_target(target, overwrite, replaceable)
    room_for(target, total)
    about = about_folder(DECODER, source.found.config, "orbax", origin=source.origin)
    with writing(target, overwrite, replaceable) as part, progress(f"writing {target.name}", 2 * total) as advance:
        arrays: dict[str, np.ndarray] = {}
        for name, header in tensors.items():
            arrays[name] = header.read()
            advance(arrays[name].nbytes)
        about["files"] = write_orbax(part, arrays)
        write_about(part, about)
        copy_others(Path(source.origin.directory), part)
        write_carried(source.origin, part)
        also(part)
        verify_orbax(part, about["files"], arrays, advance)
    return 0, 0


def _ours(plan: Plan, theirs: Mapping[str, Header]) -> dict[str, Header]:
    """Our stacked arrays, each read from all tensors that it stacks."""

    def reader(name: str, pieces: list[Piece]) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            value = np.empty(plan.ours[name].shape, theirs[pieces[0].theirs].dtype)
            for piece in pieces:
                assemble(piece, theirs[piece.theirs].read(), value)
            return value

        return read

    grouped = ((name, list(pieces)) for name, pieces in groupby(sorted(plan.pieces, key=_of_ours), key=_of_ours))
    return {
        name: Header(plan.ours[name].shape, theirs[pieces[0].theirs].dtype, reader(name, pieces))
        for name, pieces in grouped
    }


def _of_ours(piece: Piece) -> str:
    return piece.ours


def _theirs(plan: Plan, ours: Mapping[str, Header]) -> dict[str, Header]:
    """The family's tensors, cut out of our arrays. These stay in memory: a shard needs parts of every array."""
    kept = {name: replace(header, read=cache(header.read)) for name, header in ours.items()}
    return theirs_from(plan, kept, lambda header, index: header.read()[index])


def dtype_named(name: str | None) -> Any:
    """The numpy dtype named on a command line."""
    return None if name is None else {str(dtype): dtype for dtype in DTYPES.values()}[name]
