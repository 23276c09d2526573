"""Meshes and where arrays live on them: the only room that names a mesh axis."""

from jax_moe.sharding.mesh import data_mesh, expert_mesh, fitting_devices, mesh_in_use
from jax_moe.sharding.place import put_batch
from jax_moe.sharding.rules import batch_split, replicated, weight_split

__all__ = [
    "batch_split",
    "data_mesh",
    "expert_mesh",
    "fitting_devices",
    "mesh_in_use",
    "put_batch",
    "replicated",
    "weight_split",
]
