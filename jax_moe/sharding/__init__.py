"""Meshes of devices, and how weights and batches are split over them."""

from jax_moe.sharding.expert_parallel import EXCHANGES, check_exchange, exchange, exchange_in_use
from jax_moe.sharding.mesh import (
    AXES,
    DATA_AXIS,
    EXPERT_AXIS,
    TENSOR_AXIS,
    data_mesh,
    device_mesh,
    expert_mesh,
    fitting_devices,
    mesh_in_use,
    read_mesh,
)
from jax_moe.sharding.place import check_batch, fetch, put_batch, put_share, rows_here
from jax_moe.sharding.rules import (
    RULES,
    batch_split,
    check_divides,
    replicated,
    split_tree,
    weight_split,
)

__all__ = [
    "AXES",
    "DATA_AXIS",
    "EXCHANGES",
    "EXPERT_AXIS",
    "RULES",
    "TENSOR_AXIS",
    "batch_split",
    "check_batch",
    "check_divides",
    "check_exchange",
    "data_mesh",
    "device_mesh",
    "exchange",
    "exchange_in_use",
    "expert_mesh",
    "fetch",
    "fitting_devices",
    "mesh_in_use",
    "put_batch",
    "put_share",
    "read_mesh",
    "replicated",
    "rows_here",
    "split_tree",
    "weight_split",
]
