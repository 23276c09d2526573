"""How weights and batches are split over the mesh: which of a tensor's dims lies on which of the mesh's axes."""

from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_moe.config.parameters import Declared, Role
from jax_moe.sharding.mesh import DATA_AXIS, EXPERT_AXIS

AnyMesh = Mesh | AbstractMesh
Rules = Mapping[str, str]
RULES: Rules = {"E": EXPERT_AXIS, "B": DATA_AXIS}  # dims that are not here are whole on every device
WHOLE: frozenset[Role] = frozenset({"router", "correction"})  # every device routes its tokens among all experts


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
            raise ValueError(
                f"dims={array.dims!r}: must have one dim at most on axis {axis!r}, which the rules give to {both}"
            )
    fits = [axis if size % mesh.shape.get(axis, 1) == 0 else None for axis, size in zip(axes, array.shape, strict=True)]
    used = [axis if axis is not None and mesh.shape.get(axis, 1) > 1 else None for axis in fits]
    return NamedSharding(mesh, PartitionSpec(*used)) if any(used) else replicated(mesh)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Whole on every device: parameters, optimizer state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_split(mesh: Mesh) -> NamedSharding:
    """The sequences of a batch, its first dim, split over the devices."""
    return NamedSharding(mesh, PartitionSpec(RULES["B"]))
