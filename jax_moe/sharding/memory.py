"""What each device of a mesh holds: by the rules, before anything is loaded, and of arrays that are there."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from jax_moe.config.parameters import Declared
from jax_moe.sharding.rules import AnyMesh, weight_split


def numbers_on_device(mesh: AnyMesh, arrays: Mapping[str, Declared]) -> dict[str, int]:
    """{path: how many numbers of the array a device of the mesh holds}, the same on all of them."""
    return {name: math.prod(weight_split(mesh, array).shard_shape(array.shape)) for name, array in arrays.items()}


def bytes_held(tree: Any) -> int:
    """The bytes of the tree's arrays on the device of this process that holds the most, measured part by part."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
