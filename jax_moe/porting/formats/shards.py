"""A folder of weights: `.safetensors` files, read tensor by tensor, or PyTorch `.bin` files, with their index."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jax_moe.config.checks import shorten
from jax_moe.guarded import read_object
from jax_moe.porting.formats.quantised import Scheme, plain
from jax_moe.porting.formats.safetensors import map_tensors, write_tensors
from jax_moe.porting.tensors import DTYPES, PACKED, Header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_weights(directory: Path, scheme: Scheme | None = None) -> dict[str, Header]:
    """{name: header} of the folder's tensors, dequantised by the scheme when they are read. Raises ValueError naming
    every missing, broken or contradictory file, and every quantised tensor that cannot be read.
    """
    files, listed = files_of(directory)
    errors: list[str] = []
    headers: dict[str, Header] = {}
    for file in files:
        try:
            found = _open(directory / file)
        except ValueError as error:
            errors.append(str(error))
            continue
        if listed is not None:
            errors += _against_index(file, found, listed)
        headers |= found
    headers, wrong = plain(scheme, headers) if not errors else (headers, [])
    errors += wrong or _unsupported(headers)
    if errors:
        more = f"; and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise ValueError(f"{directory}: {'; '.join(errors[:20])}{more}")
    return headers


def tensor_files(directory: Path) -> dict[str, str]:
    """{tensor: the file that holds it}, by the index, or by the header of a single file. Raises ValueError as
    `open_weights`.
    """
    files, listed = files_of(directory)
    if listed is not None:
        return listed
    try:
        return dict.fromkeys(_open(directory / files[0]), files[0])
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def open_tensors(
    directory: Path, files: Mapping[str, str], names: set[str], scheme: Scheme | None = None,
    integers: Collection[str] = (),
) -> dict[str, Header]:
    """{name: header} as `open_weights`, of these stored tensors; of the folder's `files` only those that hold them are
    opened; those of `integers` may hold integers. Raises ValueError.
    """
    headers: dict[str, Header] = {}
    errors: list[str] = []
    for file in sorted({files[name] for name in names}):
        wanted = {name for name in names if files[name] == file}
        try:
            found = _open(directory / file)
        except ValueError as error:
            errors.append(str(error))
            continue
        missing = sorted(wanted - found.keys())
        errors += [f"{file} lacks {shorten(name)}, which the index says it holds" for name in missing]
        headers |= {name: found[name] for name in found if name in wanted}
    headers, wrong = plain(scheme, headers) if not errors else (headers, [])
    whole = {name for name in headers.keys() & set(integers) if headers[name].dtype in (PACKED["I32"], PACKED["I64"])}
    errors += wrong or _unsupported({name: header for name, header in headers.items() if name not in whole})
    if errors:
        raise ValueError(f"{directory}: {'; '.join(errors[:20])}")
    return headers


def _unsupported(headers: Mapping[str, Header]) -> list[str]:
    """A message if some tensors have a dtype that is not read."""
    codes = {dtype: code for code, dtype in PACKED.items()}
    dtypes = ((name, header.dtype) for name, header in headers.items() if header.dtype not in DTYPES.values())
    odd = ((name, codes.get(dtype, dtype)) for name, dtype in dtypes)
    wrong = [f"{shorten(name)} is {dtype}" for name, dtype in odd]
    more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
    return [f"tensors must be one of {', '.join(DTYPES)}: {', '.join(wrong[:20])}{more}"] if wrong else []


def _against_index(file: str, found: Mapping[str, Header], listed: Mapping[str, str]) -> list[str]:
    """Messages for the tensors of a file that are not those which the index lists for it."""
    said = {name for name, where in listed.items() if where == file}
    lacking = [f"{file} lacks {shorten(name)}, which the index says it holds" for name in sorted(said - found.keys())]
    return lacking + [
        f"{file} holds {shorten(name)}, which the index does not say" for name in sorted(found.keys() - said)
    ]


def files_of(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files that hold the weights and, for a set of shards, {tensor: file}.

    In a folder that was saved twice and holds both a single file and an index, the single file counts, as in
    transformers.
    """
    for single, index in ((SINGLE, INDEX), (BIN, BIN_INDEX)):
        if (directory / single).exists():
            return [single], None
        if (directory / index).is_file():
            listed = _read_index(directory / index)
            return sorted(set(listed.values())), listed
    raise ValueError(f"{directory}: must hold {SINGLE} or {INDEX} (or {BIN} or {BIN_INDEX})")


def _read_index(path: Path) -> dict[str, str]:
    listed = read_object(path).get("weight_map")
    # plain file names: an index must not lead outside the folder
    fits = isinstance(listed, dict) and listed and all(_plain_name(file) for file in listed.values())
    if not fits or not isinstance(listed, dict):
        raise ValueError(f"{path}: weight_map must say, for every tensor, the name of a file in this folder")
    return listed


def _plain_name(file: Any) -> bool:
    whole = isinstance(file, str) and "\0" not in file and file == Path(file).name != ""
    return whole and len(file.encode("utf-8", "replace")) < 256


def _open(path: Path) -> dict[str, Header]:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.suffix == ".safetensors":
        return map_tensors(path)
    from jax_moe.porting.formats.torch_pickle import map_pt

    return {
        name: Header(shape, dtype if dtype in DTYPES.values() else str(dtype), read)
        for name, (shape, dtype, read) in map_pt(path).items()
    }


def plan_shards(headers: Mapping[str, Header], max_shard_bytes: int) -> dict[str, list[str]]:
    """{file: names}, in order; a tensor larger than a shard gets a shard of its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, header in headers.items():
        if shards[-1] and held + header.nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += header.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_index(directory: Path, headers: Mapping[str, Header], shards: Mapping[str, list[str]]) -> None:
    """Writes the index; a single file needs none."""
    if len(shards) > 1:
        where = {name: file for file, names in shards.items() for name in names}
        total = sum(headers[name].nbytes for name in where)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_weights(directory: Path, headers: Mapping[str, Header], max_shard_bytes: int) -> None:
    """Writes the tensors, one in memory at a time, as a single file or as shards with an index, each read back."""
    shards = plan_shards(headers, max_shard_bytes)
    for file, names in shards.items():
        write_tensors(directory / file, {name: headers[name] for name in names})
    write_index(directory, headers, shards)
