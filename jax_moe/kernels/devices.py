"""Whether the kernels for Hopper GPUs run here. On its own, so that they are imported only where they do."""

import jax
import jax.numpy as jnp

from jax_moe.dims import DTypeLike

BLOCK = 128  # rows of a block in `kernels/hopper.py`


def hopper_serves(dtype: DTypeLike, model_dim: int, expert_dim: int) -> bool:
    """Whether the kernels run here, on a single Hopper GPU, and fit: 16-bit floats, dims of at least one tile."""
    return (
        jax.default_backend() == "gpu" and jax.device_count() == 1
        and str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and min(model_dim, expert_dim) >= BLOCK
    )
