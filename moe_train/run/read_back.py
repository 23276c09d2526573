"""A checkpoint read back, and compared with what was to be written, while the run goes on with other numbers."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from jax_moe.disk import same_bits
from jax_moe.porting.formats.orbax import plain, quiet

BATCH_BYTES = 1 << 28  # arrays are read back in batches of this size


@dataclass(frozen=True)
class Copy:
    """An array, or this process's parts of it, in host memory; `sharding` if other processes hold the other parts.

    On a CPU the parts are views of the array's own memory, and XLA does not donate memory that has views.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding | None
    parts: dict[str, tuple[Any, np.ndarray]]  # {its place in words: its place, the part}

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def like(self) -> Any:
        """What Orbax is to read it as: on the host, or where a part of it is in other processes, as it lies there."""
        if self.sharding is None:
            return np.empty(self.shape, self.dtype)
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)

    def same(self, again: Any) -> bool:
        """Whether the array that was read, or this process's parts of it, has the same bits."""
        if self.sharding is None:
            read = {place: np.asarray(again)[index] for place, (index, _) in self.parts.items()}
        else:
            read = {str(shard.index): np.asarray(shard.data) for shard in again.addressable_shards}
        return all(same_bits(part, np.asarray(read[place])) for place, (_, part) in self.parts.items())


def on_host(state: Any) -> Any:
    """The state with a `Copy` in place of every array; one copy of what several devices hold."""

    def shards(leaf: Any) -> dict[str, Any]:
        return {str(shard.index): shard for shard in leaf.addressable_shards} if isinstance(leaf, jax.Array) else {}

    def copy(leaf: Any) -> Copy:
        if not isinstance(leaf, jax.Array):
            return Copy(leaf.shape, leaf.dtype, None, {"": (..., leaf)})
        parts = {place: (shard.index, np.asarray(shard.data)) for place, shard in shards(leaf).items()}
        return Copy(leaf.shape, leaf.dtype, None if leaf.is_fully_addressable else leaf.sharding, parts)

    for leaf in jax.tree.leaves(state):
        for shard in shards(leaf).values():
            shard.data.copy_to_host_async()  # all of them at once
    return jax.tree.map(copy, state)


def verify(path: Path, copies: Any, settings: dict[str, Any]) -> None:
    """Raises OSError unless names, shapes, dtypes and bits read back as written, a batch of arrays at a time."""
    wrong: list[str] = []
    with quiet(), plain(path) as source:
        try:
            about = ocp.checkpointables_metadata(source)
            found, wanted = shapes(about.metadata["state"]), shapes(copies)
            wrong += sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            if about.custom_metadata != {"settings": settings}:
                wrong.append("settings")
            leaves, structure = jax.tree.flatten(copies)
            names = list(wanted)
            for batch in [] if wrong else _batches(leaves):
                like = [leaf.like if i in batch else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)]
                read = ocp.load_checkpointables(source, {"state": jax.tree.unflatten(structure, like)})["state"]
                again = jax.tree.leaves(read, is_leaf=lambda leaf: leaf is ocp.PLACEHOLDER)
                wrong += [names[i] for i in batch if not leaves[i].same(again[i])]
        except Exception as error:  # Orbax raises exceptions of a dozen classes
            wrong.append(" ".join(str(error).split())[:160] or type(error).__name__)
    if wrong:
        raise OSError(f"{path}: must read back as written; differs in {', '.join(wrong[:5])}")


def _batches(leaves: list[Copy]) -> list[list[int]]:
    batches: list[list[int]] = []
    size = BATCH_BYTES
    for number, leaf in enumerate(leaves):
        if size + leaf.nbytes > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(number)
        size += leaf.nbytes
    return batches


def shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """{path: (shape, dtype)} of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, (_, leaf) in zip(names, leaves, strict=True)}
