"""Where arrays live: the only file that names a mesh axis.

Data parallel: the batch is split over the devices of one machine, everything else is on all of them. The
programs stay written for the whole batch, so capacity and drops are those of one device. On a mesh with an expert
axis the experts' weights are split over it as well; the results stay the same.
"""


import jax
from jax.sharding import AxisType, Mesh

from jax_moe.config.checks import require

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
    require(
        wanted <= len(devices), "num_expert_devices * num_data_devices", wanted,
        f"at most {len(devices)}, the devices here",
    )
    shape = (num_data_devices, num_expert_devices)
    return jax.make_mesh(shape, (DATA_AXIS, EXPERT_AXIS), axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


def mesh_in_use() -> Mesh | None:
    """The mesh that `jax.set_mesh` has set, if any."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh
















