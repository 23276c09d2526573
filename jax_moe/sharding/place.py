"""Arrays from the host to a mesh, and back."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_moe.config.checks import require
from jax_moe.config.parameters import Declared
from jax_moe.sharding.mesh import DATA_AXIS
from jax_moe.sharding.rules import batch_split, replicated, weight_split


def place(part: Callable[[tuple[slice, ...]], np.ndarray], array: Declared, mesh: Mesh | None) -> jax.Array:
    """The placed array, made of windows `part(index)`: one at a time, only those of this process's devices.

    jax takes over the memory that `part` returns: on a CPU it may become the array.
    """
    shape = array.shape
    if mesh is None:
        return jax.block_until_ready(jax.device_put(part(tuple(slice(0, size) for size in shape))))
    sharding = weight_split(mesh, array)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(span.indices(size)[:2] for span, size in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in holders.items():
        value = part(tuple(slice(*bound) for bound in bounds))
        pieces += [jax.block_until_ready(jax.device_put(value, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def fetch(array: Any, index: tuple) -> np.ndarray:
    """array[index] on the host, for integers and whole slices; from a sharded or device array only that part is copied.

    Raises ValueError if a part of it is on no device of this process.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)[index]
    here, name = array.is_fully_addressable, "array.is_fully_addressable"
    require(here, name, here, "True: gather a model that other hosts hold too")
    return np.asarray(array)[index] if array.is_fully_replicated and _on_host(array) else _gathered(array, index)


def _gathered(array: jax.Array, index: tuple) -> np.ndarray:
    kept = [axis for axis, wanted in enumerate(index) if isinstance(wanted, slice)]
    value = np.empty([array.shape[axis] for axis in kept], array.dtype)
    for shard in array.addressable_shards:
        spans = [slice(*span.indices(size)[:2]) for span, size in zip(shard.index, array.shape, strict=True)]
        pairs = list(zip(index, spans, strict=True))
        here = all(isinstance(wanted, slice) or span.start <= wanted < span.stop for wanted, span in pairs)
        if shard.replica_id == 0 and here:
            inside = tuple(wanted if isinstance(wanted, slice) else wanted - span.start for wanted, span in pairs)
            piece = np.asarray(shard.data)[inside] if _on_host(array) else np.asarray(shard.data[inside])
            value[tuple(spans[axis] for axis in kept)] = piece
    return value


def _on_host(array: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in array.devices())


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises ValueError if the devices of the data axis do not divide the batch."""
    devices = mesh.shape[DATA_AXIS]
    allowed = f"a multiple of {devices}, the number of devices that share a batch"
    require(batch_size % devices == 0, "batch_size", batch_size, allowed)


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The sequences of a batch that lie on devices of this process, in order: its share of several processes'."""
    places = batch_split(mesh, batch_size).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index or ...] for index in places]))


def put_batch(batch: np.ndarray, mesh: Mesh) -> Any:
    """A batch on its devices. Raises ValueError if those of the data axis do not divide it."""
    check_batch(mesh, batch.shape[0])
    return jax.device_put(batch, batch_split(mesh, batch.shape[0]))


def put_number(number: int, mesh: Mesh) -> jax.Array:
    """A count on all devices, given to them by each process: nothing travels between processes."""
    return _put((), replicated(mesh), lambda _: np.asarray(number, np.uint32))


def put_share(share: np.ndarray, mesh: Mesh, batch_size: int) -> Any:
    """A batch on the devices of all processes, of which each gives its `rows_here`. Nothing travels between them."""
    rows = rows_here(mesh, batch_size)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        return share if index is None else share[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

    return _put((batch_size, *share.shape[1:]), batch_split(mesh, batch_size), part)


def _put(shape: tuple[int, ...], sharding: NamedSharding, part: Callable[[Any], np.ndarray]) -> jax.Array:
    """The array of windows `part(index)`, each put on its device of this process by name (explicit to jax's guard)."""
    places = sharding.addressable_devices_indices_map(shape)
    pieces = [jax.device_put(part(index), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)
