"""A Hugging Face model carried between its folder and an Orbax checkpoint, tensor by tensor, no model built."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jax_moe.config.checks import require
from jax_moe.config.decoder import DecoderConfig
from jax_moe.disk import check_target, writing
from jax_moe.guarded import parse_json
from jax_moe.porting.decoder_folder import open_decoder
from jax_moe.porting.families.hf import decoder_tables
from jax_moe.porting.formats.hf_folder import check_head, config_text, copy_others, is_hf, open_folder
from jax_moe.porting.formats.orbax import verify_orbax, write_orbax
from jax_moe.porting.formats.own_folder import about_folder, is_folder, write_about
from jax_moe.porting.formats.resumable import Advance, Readings, identity, resumable, room_for, write_shards
from jax_moe.porting.formats.shards import plan_shards
from jax_moe.porting.state_dict import decoder_shapes
from jax_moe.porting.table.arrays import theirs_from
from jax_moe.porting.table.plan import Piece, Plan, assemble, make_plan, their_names
from jax_moe.porting.tensors import DTYPES, Header
from jax_moe.stored import kept_paths

Progress = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Source:
    """A model to carry: its tensors under their names or ours, as their plan says."""

    path: Path
    model_type: str
    text: str  # Hugging Face's config.json
    config: DecoderConfig
    plan: Plan
    tensors: dict[str, Header]
    ours: bool  # whose names the tensors have
    others: Path  # the folder with its tokenizer
    kept: frozenset[str]  # names of those that keep their dtype
    note: str | None = None  # what wrappers had put into the names


@dataclass(frozen=True)
class Ported:
    """What was written."""

    model_type: str
    parameters: int
    dtypes: list[str]
    files: int  # shards; 0: none
    kept: int  # of them left by an interrupted port


def port_decoder(
    source: Path, target: Path, to: Literal["hf", "orbax"], *, dtype: np.dtype | None, max_shard_bytes: int, overwrite: bool,
    allow_nonfinite: bool, progress: Progress, say: Callable[[str], None], also: Callable[[Path], None] = lambda part: None,
) -> Ported:
    """Reads either form, writes either; verified bit for bit before it stands at `target`. `also` writes more into the folder.

    Between Hugging Face folders one tensor is in memory at a time, to and from Orbax all. What goes to Hugging Face can be
    interrupted and resumed.
    """
    require(max_shard_bytes >= 1, "max_shard_bytes", max_shard_bytes, "at least 1")
    with open_source(source) as found:
        if found.note is not None:
            say(f"{source}: {found.note}")
        read = Readings(found.tensors, dtype, allow_nonfinite, str(source), found.kept).converted()
        if dtype is not None:
            found = replace(found, text=config_text(found.text, parse_json(found.text, found.path), dtype))
        write = _write_hf if to == "hf" else _write_orbax
        files, kept = write(replace(found, tensors=read), target, max_shard_bytes, overwrite, progress, say, also)
    elements = sum(math.prod(shape) for shape in found.plan.our_shapes.values())
    return Ported(found.model_type, elements, sorted({one.dtype.name for one in read.values()}), files, kept)


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """A Hugging Face folder or an Orbax folder of one, its tensors still to be read."""
    if is_hf(path):
        with open_folder(path) as folder:
            check_head(folder)
            kept = their_names(folder.plan, kept_paths(folder.model))
            text = folder.origin.config_json
            yield Source(path, folder.model_type, text, folder.config, folder.plan, folder.stored, False, path, kept, folder.note)
        return
    origin, model, arrays = open_decoder(path)
    plan = make_plan(decoder_tables(model.config, origin.model_type)[0], decoder_shapes(model))
    others, kept = Path(origin.directory), kept_paths(model)
    yield Source(path, origin.model_type, origin.config_json, model.config, plan, arrays, True, others, kept)


def replaceable(path: Path) -> bool:
    """Whether a folder is a checkpoint of either kind."""
    return is_hf(path) or is_folder(path)


def _write_hf(
    source: Source, target: Path, max_shard_bytes: int, overwrite: bool, progress: Progress, say: Callable[[str], None],
    also: Callable[[Path], None],
) -> tuple[int, int]:
    tensors = _theirs(source.plan, source.tensors) if source.ours else source.tensors
    shards, total = plan_shards(tensors, max_shard_bytes), sum(one.nbytes for one in tensors.values())
    check_target(target, overwrite, replaceable)
    room_for(target, total)
    dtypes = {name: one.dtype.name for name, one in tensors.items()}
    note = {"source": identity(source.path), "dtypes": dtypes, "shards": shards}
    with resumable(target, overwrite, replaceable, note, say) as part, progress(f"writing {target.name}", total) as advance:
        kept = write_shards(part, tensors, shards, advance)
        (part / "config.json").write_text(source.text, encoding="utf-8")
        copy_others(source.others, part)
        also(part)
    return len(shards), kept


def _write_orbax(
    source: Source, target: Path, _max_shard_bytes: int, overwrite: bool, progress: Progress, _say: Callable[[str], None],
    also: Callable[[Path], None],
) -> tuple[int, int]:
    tensors = source.tensors if source.ours else _ours(source.plan, source.tensors)
    total = sum(one.nbytes for one in tensors.values())
    check_target(target, overwrite, replaceable)
    room_for(target, total)
    about = about_folder("decoder", source.config, "orbax", origin=(source.model_type, source.text))
    with writing(target, overwrite, replaceable) as part, progress(f"writing {target.name}", 2 * total) as advance:
        arrays: dict[str, np.ndarray] = {}
        for name, header in tensors.items():
            arrays[name] = header.read()
            advance(arrays[name].nbytes)
        about["files"] = write_orbax(part, arrays)
        write_about(part, about)
        copy_others(source.others, part)
        also(part)
        verify_orbax(part, about["files"], arrays, advance)
    return 0, 0


def _ours(plan: Plan, theirs: Mapping[str, Header]) -> dict[str, Header]:
    """Our stacked arrays, each read from all of its tensors."""

    def reader(name: str, pieces: list[Piece]) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            value = np.empty(plan.our_shapes[name], theirs[pieces[0].theirs].dtype)
            for piece in pieces:
                assemble(piece, theirs[piece.theirs].read(), value)
            return value

        return read

    grouped = ((name, list(pieces)) for name, pieces in groupby(sorted(plan.pieces, key=_of_ours), key=_of_ours))
    return {
        name: Header(plan.our_shapes[name], theirs[pieces[0].theirs].dtype, reader(name, pieces)) for name, pieces in grouped
    }


def _of_ours(piece: Piece) -> str:
    return piece.ours


def _theirs(plan: Plan, ours: Mapping[str, Header]) -> dict[str, Header]:
    """Their tensors, each taken out of ours, which stay in memory: a shard wants a little of every stacked array."""
    kept = {name: replace(one, read=cache(one.read)) for name, one in ours.items()}
    return theirs_from(plan, kept, lambda one, index: one.read()[index])


def dtype_named(name: str | None) -> Any:
    """numpy's dtype of a name on the command line."""
    return None if name is None else {str(one): one for one in DTYPES.values()}[name]
