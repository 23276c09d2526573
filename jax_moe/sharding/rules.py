"""How weights and batches are split over the mesh."""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_moe.sharding.mesh import DATA_AXIS, EXPERT_AXIS


def weight_split(mesh: Mesh, shape: tuple[int, ...], expert_axis: int | None) -> NamedSharding:
    """Experts split over the mesh's expert axis if it has one that divides them; whole on every device otherwise."""
    devices = mesh.shape.get(EXPERT_AXIS, 1)
    if expert_axis is None or devices == 1 or shape[expert_axis] % devices:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*(None,) * expert_axis, EXPERT_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device: parameters, optimizer state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_split(mesh: Mesh) -> NamedSharding:
    """The first dim split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))
