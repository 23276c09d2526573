"""Mixed precision as one object: in which dtype weights are stored, products are computed and losses are taken.

Settings are standard library only; jax and flax are imported where weights are cast.
"""

from typing import Any, TypeVar

from jax_moe.config.precision import PRECISIONS as PRECISIONS
from jax_moe.config.precision import Precision

Tree = TypeVar("Tree")


def cast_to_compute(params: Tree, precision: Precision) -> Tree:
    """A module, or its state, with weights as a call should see them: cast as `Precision.dtype_of` says of their roles.

    To be used inside the loss, so that gradients come back in the stored dtype. Not cast are routers, Soft MoE's phi,
    kept variables, integers and, unless `cast_experts` is "at_once", experts. Norms become `norms`, all else `compute`;
    the embeddings' dtype is that of the residual stream. Raises ValueError for arrays outside variables, which have no
    role: merge them into the module first.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jax_moe.stored import Kept

    def cast(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            kind = type(variable).__name__
            raise ValueError(
                f"params: must be a module or its state; here is {kind} without a role: nnx.merge it first"
            )
        dtype = precision.dtype_of(variable.get_metadata().get("role"))
        if dtype is None or isinstance(variable, Kept) or not jnp.issubdtype(variable.dtype, jnp.floating):
            return variable
        return jax.tree.map(lambda value: value.astype(dtype), variable)

    return jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
