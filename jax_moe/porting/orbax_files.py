"""Orbax checkpoints of bare weights: {our path: array} as a nested dict, written whole, read one array at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.porting.files import same_bits
from jax_moe.porting.tensor_file import Header

ITEM = "state"  # what ocp.load(folder) reads
MARK = "_CHECKPOINT_METADATA"


def write_orbax(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A new folder that `orbax.checkpoint.v1.load` reads."""
    from orbax.checkpoint import v1 as ocp

    ocp.save_checkpointables(path.absolute(), {ITEM: _nested(arrays)})


def read_orbax(path: Path) -> dict[str, Header]:
    """{our path: header}. Raises ValueError for what is no whole Orbax checkpoint."""
    from orbax.checkpoint import v1 as ocp

    try:
        leaves = _flat(ocp.checkpointables_metadata(path.absolute()).metadata[ITEM])
        return {name: Header(tuple(one.shape), np.dtype(one.dtype), _reader(path, leaves, name)) for name, one in leaves.items()}
    except Exception as error:  # Orbax raises a dozen kinds for a damaged folder
        raise damaged(path, error) from None


def verify_orbax(path: Path, arrays: Mapping[str, np.ndarray], advance: Callable[[int], None]) -> None:
    """Raises ValueError unless every array reads back bit for bit."""
    found = read_orbax(path)
    wrong = sorted(found.keys() ^ arrays.keys())
    for name in found.keys() & arrays.keys():
        if not same_bits(arrays[name], found[name].read()):
            wrong.append(name)
        advance(arrays[name].nbytes)
    if wrong:
        raise ValueError(f"{path}: must read back as written; differs in {', '.join(wrong[:20])}")


def damaged(path: Path, error: Exception) -> ValueError:
    """One line for a checkpoint that cannot be read."""
    reason = " ".join(str(error).split())[:160]
    return ValueError(f"{path}: must be a whole Orbax checkpoint, it is damaged or cut short ({reason})")


def _reader(path: Path, leaves: Mapping[str, Any], wanted: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        from orbax.checkpoint import v1 as ocp

        leaf = leaves[wanted]
        like = dict.fromkeys(leaves, ocp.PLACEHOLDER) | {wanted: np.empty(leaf.shape, leaf.dtype)}
        try:
            return _flat(ocp.load_checkpointables(path.absolute(), {ITEM: _nested(like)})[ITEM])[wanted]
        except Exception as error:
            raise damaged(path, error) from None

    return read


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
