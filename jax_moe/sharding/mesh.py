"""Meshes of devices: the only file that names a mesh axis.

- data: the batch is split over it; of weights and optimizer state the model's width is (as fully sharded data
  parallelism does), and put together where a layer needs it
- expert: experts are split over it, and the batch as well
- sequence: the positions of activations are split over it; weights, gradients and optimizer state are whole
- tensor: heads, experts' width and vocabulary are split over it

Programs are written for one device: XLA splits them, so capacity and drops are those of a single device on any mesh.
"""

from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh

from jax_moe.config.checks import require

DATA_AXIS, EXPERT_AXIS, SEQUENCE_AXIS, TENSOR_AXIS = "data", "expert", "sequence", "tensor"
AXES = (DATA_AXIS, EXPERT_AXIS, SEQUENCE_AXIS, TENSOR_AXIS)
FORM = "axes with their number of devices, such as data=4,expert=2"


def fitting_devices(batch_size: int, available: int) -> int:
    """The most devices, up to `available`, that divide the batch."""
    return max(n for n in range(1, available + 1) if batch_size % n == 0)


def read_mesh(text: str) -> dict[str, int]:
    """{axis: devices} of "data=4,expert=2".

    Raises ValueError for another form, and for an axis that is not here or named twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, number = (word.strip() for word in part.partition("="))
        require(bool(equals) and number.isdecimal() and len(number) < 10, "mesh", text, FORM)
        require(axis in AXES, "mesh", text, f"of the axes {', '.join(AXES)}")
        require(axis not in sizes, "mesh", text, f"with {axis} once")
        require(int(number) >= 1, "mesh", text, "at least one device on each axis")
        sizes[axis] = int(number)
    return sizes


def device_mesh(sizes: Mapping[str, int]) -> Mesh:
    """The mesh with so many devices on each axis; 1 on those not named. It takes the first devices.

    With several processes it takes all devices of all of them, those of a process together on the last axes. Raises
    ValueError for an axis that is not here, a size below 1, and more devices than there are, or with several processes
    fewer. Axes are Auto; layers and models run on Explicit ones too, jax.make_mesh's default (`sharding/explicit.py`).
    """
    require(sizes.keys() <= set(AXES), "mesh", ", ".join(sizes), f"of the axes {', '.join(AXES)}")
    devices, wanted = jax.devices(), 1
    for axis, size in sizes.items():
        require(size >= 1, axis, size, "at least 1")
        wanted *= size
    words = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    allowed = f"of at most {len(devices)} devices, those here"
    if jax.process_count() > 1:
        allowed = f"of {len(devices)} devices in all, those of the {jax.process_count()} processes"
    fits = wanted == len(devices) if jax.process_count() > 1 else wanted <= len(devices)
    require(fits, "mesh", words, allowed)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:wanted])


def data_mesh(num_devices: int) -> Mesh:
    """A mesh of the first `num_devices` devices, on the data axis. Raises ValueError if there are fewer."""
    count = jax.device_count()
    require(1 <= num_devices <= count, "num_devices", num_devices, f"1 to {count}, the devices here")
    return device_mesh({DATA_AXIS: num_devices})


def expert_mesh(num_expert_devices: int, num_data_devices: int = 1) -> Mesh:
    """A mesh [data, expert] of the first devices. Raises ValueError if there are fewer."""
    return device_mesh({DATA_AXIS: num_data_devices, EXPERT_AXIS: num_expert_devices})


def mesh_in_use() -> Mesh | None:
    """The mesh that `jax.set_mesh` has set, if any."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh
