"""A folder of weights: one or many `.safetensors` (read one tensor at a time) or PyTorch `.bin` files, with their index."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_moe.porting.files import read_state, verify, write_safetensors

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor before it is read; `dtype` and `shape` as of an array."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]


@contextmanager
def open_weights(directory: Path) -> Iterator[dict[str, Header]]:
    """{name: header} of all tensors of the folder. Raises ValueError naming every missing, broken or contradictory file."""
    files, listed = _files(directory)
    errors: list[str] = []
    headers: dict[str, Header] = {}
    with ExitStack() as stack:
        for file in files:
            try:
                found = _open(directory / file, stack)
            except ValueError as error:
                errors.append(str(error))
                continue
            if listed is not None:
                said = {name for name, where in listed.items() if where == file}
                errors += [f"{file} lacks {name}, which the index says it holds" for name in sorted(said - found.keys())]
                errors += [f"{file} holds {name}, which the index does not say" for name in sorted(found.keys() - said)]
            headers |= found
        wrong = [f"{name} is {header.dtype}" for name, header in headers.items() if isinstance(header.dtype, str)]
        if wrong:
            errors.append(f"tensors must be one of {', '.join(DTYPES)}: {', '.join(wrong[:20])}")
        if errors:
            more = f"; and {len(errors) - 20} more" if len(errors) > 20 else ""
            raise ValueError(f"{directory}: {'; '.join(errors[:20])}{more}")
        yield headers


def _files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files that hold the weights and, for a set of shards, {tensor: file}."""
    for single, index in ((SINGLE, INDEX), (BIN, BIN_INDEX)):
        if (directory / index).is_file():
            listed = _read_index(directory / index)
            return sorted(set(listed.values())), listed
        if (directory / single).exists():
            return [single], None
    raise ValueError(f"{directory}: must hold {SINGLE} or {INDEX} (or {BIN} or {BIN_INDEX})")


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: must be JSON with a weight_map") from None
    # a plain file name: an index must not make us read elsewhere
    fits = isinstance(listed, dict) and listed and all(isinstance(f, str) and f == Path(f).name != "" for f in listed.values())
    if not fits:
        raise ValueError(f"{path}: weight_map must say, for every tensor, the name of a file in this folder")
    return listed


def _open(path: Path, stack: ExitStack) -> dict[str, Header]:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.suffix != ".safetensors":
        state = read_state(path)
        return {name: Header(value.shape, _known(value.dtype), lambda value=value: value) for name, value in state.items()}  # type: ignore[misc]
    from safetensors import SafetensorError, safe_open

    try:
        file = stack.enter_context(safe_open(path, framework="np"))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Header(tuple(one.get_shape()), DTYPES.get(one.get_dtype(), one.get_dtype()), _reader(file, name))
            for name, one in slices.items()
        }
    except (SafetensorError, OSError):
        raise ValueError(f"{path.name} must be a whole .safetensors file, it is not one or is cut short") from None


def _known(dtype: np.dtype) -> Any:
    return dtype if dtype in DTYPES.values() else str(dtype)


def _reader(file: Any, name: str) -> Callable[[], np.ndarray]:
    return lambda: file.get_tensor(name)


def write_weights(
    directory: Path, sizes: Mapping[str, int], tensor: Callable[[str], np.ndarray], max_shard_bytes: int
) -> None:
    """Writes `tensor(name)` for every name in `sizes` (bytes): one file, or shards with their index, each read back."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state = {name: tensor(name) for name in names}
        write_safetensors(directory / file, state, {"format": "pt"})
        verify(state, read_state(directory / file), directory / file)
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(files.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
