"""`.safetensors` files: read as views of the mapped file, written tensor by tensor, verified by the library.

The library checks every header. A file may be larger than the memory: only a part of it is read at a time.
"""

import json
import mmap
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.config.checks import require, shorten
from jax_moe.disk import READABLE, same_bits
from jax_moe.guarded import parse_json, refuse_pointer_file
from jax_moe.porting.tensors import DTYPES, PACKED, Header

NOT_WHOLE = "must be a whole .safetensors file, it is not one or is cut short"
CODES = {dtype: code for code, dtype in {**PACKED, **DTYPES}.items()}
SORTED = ("I64", "F64", "F32", "I32", "BF16", "F16")  # the order in which the library writes dtypes
CHECKED_BYTES = 1 << 20  # bytes read back at a time
BATCH_BYTES = 1 << 26  # bytes read before the file is opened anew


def map_tensors(path: Path) -> dict[str, Header]:
    """{name: header}; `read` returns a read-only view of the file, valid for as long as it is held.

    Raises ValueError for a file that is not whole, a header with wrong sizes or offsets, or a repeated name.
    """
    from safetensors import SafetensorError, safe_open

    refuse_pointer_file(path)
    try:
        with safe_open(path, framework="np") as file:
            whole = set(file.keys())
        with path.open("rb") as raw:
            (size,) = struct.unpack("<Q", raw.read(8))
            listed = parse_json(raw.read(size), "its header", _unique)
            mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path.name} {NOT_WHOLE} ({reason})") from None
    except ValueError as error:
        raise ValueError(f"{path.name} must be a whole .safetensors file ({error})") from None
    listed.pop("__metadata__", None)
    if listed.keys() != whole:
        raise ValueError(f"{path.name} must be a whole .safetensors file (its header is read in two ways)")
    return {name: _mapped(mapped, 8 + size, about) for name, about in listed.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys, of which readers disagree which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"its header says twice: {shorten(', '.join(twice[:20]))}")
    return found


def _mapped(mapped: mmap.mmap, data: int, about: dict[str, Any]) -> Header:
    code, shape, offset = about["dtype"], tuple(about["shape"]), data + about["data_offsets"][0]
    dtype = DTYPES.get(code) or PACKED.get(code)
    if dtype is None:
        return Header(shape, code, lambda: np.empty(0))

    def read() -> np.ndarray:
        if hasattr(mmap, "MADV_DONTNEED"):  # frees pages read before; the page cache keeps them
            mapped.madvise(mmap.MADV_DONTNEED)
        return np.ndarray(shape, dtype, mapped, offset)

    return Header(shape, dtype, read)


def write_tensors(path: Path, headers: Mapping[str, Header]) -> None:
    """Writes the file that the library's `save_file` would write, byte for byte, with a single tensor in memory at a
    time.

    Raises ValueError unless the library reads every tensor back bit for bit.
    """
    from safetensors import safe_open

    names = sorted(headers, key=lambda name: (SORTED.index(CODES[headers[name].dtype]), name))
    text, end = _header(names, headers)
    wrong: list[str] = []
    with path.open("wb") as file:
        file.write(text)
        file.truncate(len(text) + end)  # at full length it can be opened, and each tensor read back
        for some in in_batches(names, headers):
            with safe_open(path, framework="np") as written:
                for name in some:
                    value = np.ascontiguousarray(headers[name].read()).reshape(headers[name].shape)
                    file.write(value.reshape(-1).view(np.uint8).data)
                    file.flush()
                    wrong += [] if reads_as(written, name, value) else [name]
    if wrong:
        raise ValueError(f"{path}: must read back as written; differs in {', '.join(wrong[:20])}")


def copy_with(source: Path, target: Path, changed: Mapping[str, Header]) -> None:
    """Copies a file with some of its tensors changed: same shape and dtype, every other byte as it was.

    Raises ValueError unless the library reads the changed tensors back bit for bit.
    """
    from safetensors import safe_open

    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        listed = parse_json(file.read(size), "its header", _unique)
        for name, header in changed.items():
            about, value = listed[name], np.ascontiguousarray(header.read()).reshape(header.shape)
            held = (CODES[value.dtype], list(value.shape))
            require(held == (about["dtype"], about["shape"]), name, held, f"{about['dtype']} of {about['shape']}")
            file.seek(8 + size + about["data_offsets"][0])
            file.write(value.reshape(-1).view(np.uint8).data)
    for some in in_batches(changed, changed):
        with safe_open(target, framework="np") as written:
            wrong = [name for name in some if not reads_as(written, name, changed[name].read())]
        if wrong:
            raise ValueError(f"{target}: must read back as written; differs in {', '.join(wrong[:20])}")


def _header(names: list[str], headers: Mapping[str, Header]) -> tuple[bytes, int]:
    """The bytes before the data, as the library writes them, and the size of the data in bytes."""
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + headers[name].nbytes
        dtype, shape = CODES[headers[name].dtype], list(headers[name].shape)
        about[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def in_batches(names: Iterable[str], headers: Mapping[str, Header]) -> Iterator[list[str]]:
    """Names in batches of some megabytes: the library keeps what it has read in memory until it closes the file."""
    batch: list[str] = []
    held = 0
    for name in names:
        batch.append(name)
        held += headers[name].nbytes
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def reads_as(file: Any, name: str, value: np.ndarray) -> bool:
    """Whether the library's opened file has this tensor, bit for bit; a large tensor is read some rows at a time."""
    stored = file.get_slice(name)
    if tuple(stored.get_shape()) != value.shape:
        return False
    if value.ndim == 0 or value.nbytes <= CHECKED_BYTES:
        return same_bits(file.get_tensor(name), value)
    rows = max(1, CHECKED_BYTES // (value.nbytes // len(value)))
    spans = (slice(i, min(i + rows, len(value))) for i in range(0, len(value), rows))  # the library clips no span
    return all(same_bits(stored[span], value[span]) for span in spans)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """{name: array}, read tensor by tensor, so that the file is never in memory twice."""
    from safetensors import SafetensorError, safe_open

    refuse_pointer_file(path)
    try:
        with safe_open(path, framework="np") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in sorted(file.keys())}
            odd = [f"{shorten(name)} is {dtype}" for name, dtype in dtypes.items() if dtype not in READABLE]
            if odd:
                raise ValueError(f"{path}: must hold tensors of {', '.join(READABLE)}; {', '.join(odd[:20])}")
            return {name: file.get_tensor(name) for name in dtypes}
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path}: {NOT_WHOLE} ({reason})") from None


def write_safetensors(path: Path, state: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Makes every array contiguous first: of a transposed view the library would silently write other numbers."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in state.items()}
    save_file(arrays, path, metadata)
