"""Whether the kernels for Hopper GPUs and TPUs run here. On its own, so that they are imported only where they do."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jax_moe.dims import DTypeLike

BLOCK = 128  # rows of a block in `kernels/hopper.py`, lanes of a TPU


def hopper_serves(dtype: DTypeLike, model_dim: int, expert_dim: int) -> bool:
    """Whether the kernels run here, on a single Hopper GPU, and fit: 16-bit floats, dims of at least one tile."""
    return (
        jax.default_backend() == "gpu" and jax.device_count() == 1
        and str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and min(model_dim, expert_dim) >= BLOCK
    )


def megablox_serves(dtype: DTypeLike, model_dim: int, expert_dim: int) -> bool:
    """Whether the kernels run here, on a TPU, and fit: bf16, dims of at least one tile.

    XLA does not split a kernel: it runs on a single device, or on one device's part inside `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = zip(mesh.shape.values(), mesh.axis_types, strict=True)
    alone = all(size == 1 or kind == AxisType.Manual for size, kind in parts)
    return (
        jax.default_backend() == "tpu" and (jax.device_count() == 1 if mesh.empty else alone)
        and jnp.dtype(dtype) == jnp.bfloat16 and min(model_dim, expert_dim) >= BLOCK
    )
