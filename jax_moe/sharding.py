"""Where arrays live: the only file that names a mesh axis.

Data parallel: the batch is split over the devices of one machine, everything else is on all of them. The
programs stay written for the whole batch, so capacity and drops are those of one device. On a mesh with an expert
axis the experts' weights are split over it as well; the results stay the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_moe.config import require

DATA_AXIS = "data"
EXPERT_AXIS = "expert"


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


def expert_mesh(num_expert_devices: int, num_data_devices: int = 1) -> Mesh:
    """A mesh [data, expert] of this process's first devices. Raises ValueError if there are fewer."""
    devices, wanted = jax.local_devices(), num_expert_devices * num_data_devices
    require(num_expert_devices >= 1, "num_expert_devices", num_expert_devices, "at least 1")
    require(num_data_devices >= 1, "num_data_devices", num_data_devices, "at least 1")
    require(wanted <= len(devices), "num_expert_devices * num_data_devices", wanted, f"at most {len(devices)}, the devices here")
    shape = (num_data_devices, num_expert_devices)
    return jax.make_mesh(shape, (DATA_AXIS, EXPERT_AXIS), axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


def mesh_in_use() -> Mesh | None:
    """The mesh that `jax.set_mesh` has set, if any."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def weight_split(mesh: Mesh, shape: tuple[int, ...], expert_axis: int | None) -> NamedSharding:
    """Experts split over the mesh's expert axis if it has one that divides them; whole on every device otherwise."""
    devices = mesh.shape.get(EXPERT_AXIS, 1)
    if expert_axis is None or devices == 1 or shape[expert_axis] % devices:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*(None,) * expert_axis, EXPERT_AXIS))


def place(
    part: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], mesh: Mesh | None, expert_axis: int | None
) -> jax.Array:
    """An array of which `part` makes the window it is asked for: one at a time, those of this process's devices only.

    The memory that `part` returns is jax's from then on: on a CPU it may become the array.
    """
    if mesh is None:
        return jax.block_until_ready(jax.device_put(part(tuple(slice(0, size) for size in shape))))
    sharding = weight_split(mesh, shape, expert_axis)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(tuple(one.indices(size)[:2] for one, size in zip(index or (), shape, strict=True)), []).append(device)
    pieces = []
    for bounds, devices in holders.items():
        value = part(tuple(slice(*one) for one in bounds))
        pieces += [jax.block_until_ready(jax.device_put(value, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def fetch(array: Any, index: tuple) -> np.ndarray:
    """array[index] on the host, for integers and whole slices; of an array that lies in pieces or off the host only that part.

    Raises ValueError if a part of it is on no device of this process.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)[index]
    require(array.is_fully_addressable, "array.is_fully_addressable", False, "True: gather a model that other hosts hold too")
    return np.asarray(array)[index] if array.is_fully_replicated and _on_host(array) else _gathered(array, index)


def _gathered(array: jax.Array, index: tuple) -> np.ndarray:
    kept = [axis for axis, one in enumerate(index) if isinstance(one, slice)]
    value = np.empty([array.shape[axis] for axis in kept], array.dtype)
    for shard in array.addressable_shards:
        spans = [slice(*one.indices(size)[:2]) for one, size in zip(shard.index, array.shape, strict=True)]
        pairs = list(zip(index, spans, strict=True))
        if shard.replica_id == 0 and all(isinstance(one, slice) or span.start <= one < span.stop for one, span in pairs):
            inside = tuple(one if isinstance(one, slice) else one - span.start for one, span in pairs)
            piece = np.asarray(shard.data)[inside] if _on_host(array) else np.asarray(shard.data[inside])
            value[tuple(spans[axis] for axis in kept)] = piece
    return value


def _on_host(array: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in array.devices())


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
