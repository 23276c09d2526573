"""One file that holds a state dict: .safetensors, .pt, .pth or .bin."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jax_moe.disk import verify, writing
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from jax_moe.porting.formats.wrapped import Opened

PT_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PT_SUFFIXES)


def read_state(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of a `.safetensors`, `.pt`, `.pth` or `.bin` file. Raises ValueError if it is damaged."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: must be a file")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix in PT_SUFFIXES:
        from jax_moe.porting.formats.torch_pickle import read_pt

        return read_pt(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    raise ValueError(f"{path}: must end in one of {', '.join(SUFFIXES)}")


def read_whole(path: Path) -> Opened:
    """The state dict of a file; of a trainer's `.pt`, the model's, with what stood around it."""
    if path.suffix in PT_SUFFIXES and path.is_file():
        from jax_moe.porting.formats.torch_pickle import read_whole_pt

        return read_whole_pt(path)
    return Opened(read_state(path), None, {}, "")


def write_state(path: Path, state: Mapping[str, np.ndarray], *, overwrite: bool = False) -> None:
    """Writes `path` whole or not at all, by its ending, and only once it reads back bit for bit."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: must end in one of {', '.join(SUFFIXES)}")

    def write(part: Path) -> None:
        if path.suffix in PT_SUFFIXES:
            from jax_moe.porting.formats.torch_pickle import write_pt

            write_pt(part, state)
        else:
            write_safetensors(part, state)
        verify(state, read_state(part), path)

    with writing(path, overwrite) as part:
        write(part)
