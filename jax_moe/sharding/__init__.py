"""Meshes of devices, and how weights and batches are split over them."""

from jax_moe.sharding.mesh import DATA_AXIS, EXPERT_AXIS, data_mesh, expert_mesh, fitting_devices, mesh_in_use
from jax_moe.sharding.place import fetch, put_batch
from jax_moe.sharding.rules import batch_split, replicated, weight_split

__all__ = [
    "DATA_AXIS",
    "EXPERT_AXIS",
    "batch_split",
    "data_mesh",
    "expert_mesh",
    "fetch",
    "fitting_devices",
    "mesh_in_use",
    "put_batch",
    "replicated",
    "weight_split",
]
