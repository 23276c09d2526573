"""Where arrays live: the only file that names a mesh axis.

Data parallel: the batch is split over the devices of one machine, everything else is on all of them. The
programs stay written for the whole batch, so capacity and drops are those of one device.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_moe.config import require

DATA_AXIS = "data"


def fitting_devices(batch_size: int, available: int) -> int:
    """The most devices, up to `available`, that divide the batch."""
    return max(n for n in range(1, available + 1) if batch_size % n == 0)


def data_mesh(num_devices: int) -> Mesh:
    """A mesh of this process's first `num_devices` devices. Raises ValueError if there are fewer.

    Auto axes: under Explicit ones, jax.make_mesh's default, gathers raise.
    """
    devices = jax.local_devices()
    require(1 <= num_devices <= len(devices), "num_devices", num_devices, f"1 to {len(devices)}, the devices here")
    return jax.make_mesh((num_devices,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:num_devices])


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device: parameters, optimizer state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_split(mesh: Mesh) -> NamedSharding:
    """The first dim split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put_batch(batch: np.ndarray, mesh: Mesh) -> Any:
    """A batch on its devices. Raises ValueError if they do not divide it."""
    devices = mesh.shape[DATA_AXIS]
    require(batch.shape[0] % devices == 0, "batch_size", batch.shape[0], f"a multiple of num_devices={devices}")
    return jax.device_put(batch, batch_split(mesh))
