"""How weights and batches are split over the mesh: which of a tensor's dims lies on which of the mesh's axes."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_moe.config.checks import require
from jax_moe.config.parameters import Declared, Role
from jax_moe.parameters import path_of
from jax_moe.sharding.mesh import DATA_AXIS, EXPERT_AXIS, SEQUENCE_AXIS, TENSOR_AXIS

AnyMesh = Mesh | AbstractMesh
Rules = Mapping[str, str]
# Dims that are not here are whole on every device, and so is a dim that its axis does not divide.
RULES: Rules = {
    "E": EXPERT_AXIS, "F": TENSOR_AXIS, "H": TENSOR_AXIS, "J": TENSOR_AXIS, "V": TENSOR_AXIS, "D": DATA_AXIS,
}
BATCH = (DATA_AXIS, EXPERT_AXIS)  # the axes over which the sequences of a batch are split
WHOLE: frozenset[Role] = frozenset({"router", "correction", "norm"})  # small, and all tokens need all of them
DIVIDES = {"E": "the experts", "H": "the attention heads"}  # dims that a mesh must divide


def weight_split(mesh: AnyMesh, array: Declared, rules: Rules = RULES) -> NamedSharding:
    """The partition: a dim is split over its rule's axis if the mesh has the axis and its size divides the dim.

    Raises ValueError for a tensor of which two dims lie on one axis.
    """
    if array.role in WHOLE or not array.letters:
        return replicated(mesh)
    axes = [rules.get(letter) for letter in array.letters]
    for axis in filter(None, axes):
        if axes.count(axis) > 1:
            both = " and ".join(letter for letter in array.letters if rules.get(letter) == axis)
            allowed = f"must have one dim at most on axis {axis!r}, which the rules give to {both}"
            raise ValueError(f"dims={array.dims!r}: {allowed}")
    fits = [axis if size % mesh.shape.get(axis, 1) == 0 else None for axis, size in zip(axes, array.shape, strict=True)]
    used = [axis if axis is not None and mesh.shape.get(axis, 1) > 1 else None for axis in fits]
    return NamedSharding(mesh, PartitionSpec(*used)) if any(used) else replicated(mesh)


def check_divides(mesh: AnyMesh, arrays: Mapping[str, Declared], rules: Rules = RULES) -> None:
    """Raises ValueError if an axis of the mesh does not divide the experts or the attention heads of these arrays."""
    for array in arrays.values():
        for letter, size in zip(array.letters, array.shape, strict=True) if array.role not in WHOLE else ():
            axis = rules.get(letter, "")
            number = mesh.shape.get(axis, 1)
            fits = letter not in DIVIDES or size % number == 0
            require(fits, f"mesh {axis}", number, f"a divisor of {size}, {DIVIDES.get(letter)} of the model")


def split_tree(mesh: AnyMesh, tree: Any, arrays: Mapping[str, Declared], rules: Rules = RULES) -> Any:
    """The partition of every leaf of a tree: parameters, or an optimizer's state with a copy of them inside.

    `arrays` are the parameters' declarations by path. A leaf whose path ends in a parameter's, and that has its shape,
    lies as the parameter does; any other, such as a step count, is whole.
    """

    def partition(keys: tuple, leaf: Any) -> NamedSharding:
        words = path_of(keys).split(".")
        ends = (".".join(words[i:]) for i in range(len(words)))
        array = next((arrays[end] for end in ends if end in arrays), None)
        fits = array is not None and tuple(leaf.shape) == array.shape
        return weight_split(mesh, array, rules) if array is not None and fits else replicated(mesh)

    return jax.tree_util.tree_map_with_path(partition, tree)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def position_devices(mesh: AnyMesh, num_positions: int) -> int:
    """The devices that share the positions of a sequence: those of the sequence axis, 1 where it does not divide."""
    number = mesh.shape.get(SEQUENCE_AXIS, 1)
    return number if num_positions % number == 0 else 1


def batch_split(mesh: AnyMesh, batch_size: int, num_positions: int = 1) -> NamedSharding:
    """The sequences of a batch, its first dim, split over the data axis, and the expert axis too where that divides;
    the positions, its second dim, over the sequence axis where that divides.
    """
    axes: list[str] = []
    parts = 1
    for axis in BATCH:
        number = mesh.shape.get(axis, 1)
        if number > 1 and batch_size % (parts * number) == 0:
            axes.append(axis)
            parts *= number
    positions = (SEQUENCE_AXIS,) if position_devices(mesh, num_positions) > 1 else ()
    split = PartitionSpec(tuple(axes) or None, *positions)
    return NamedSharding(mesh, split) if axes or positions else replicated(mesh)
