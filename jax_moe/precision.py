"""Mixed precision: weights cast by role, as `Precision` says. jax and flax are imported at the first call."""

from typing import Any, TypeVar

from jax_moe.config.precision import PRECISIONS as PRECISIONS
from jax_moe.config.precision import Precision

Tree = TypeVar("Tree")


def cast_to_compute(params: Tree, precision: Precision) -> Tree:
    """A copy of a module, or of its state, with each weight cast as `Precision.dtype_of` says of its role.

    Use it inside the loss, so that gradients have the stored dtype. Routers, Soft MoE's phi, kept variables and
    integers are not cast, nor are experts unless `cast_experts` is "at_once". Norms become `norms`, all other weights
    `compute`; the embeddings' dtype is that of the residual stream. Raises ValueError for arrays outside variables,
    which have no role: merge them into the module first.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jax_moe.stored import Kept

    def cast(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            kind = type(variable).__name__
            must = f"must be a module or its state; here is {kind} without a role: nnx.merge it first"
            raise ValueError(f"params: {must}")
        dtype = precision.dtype_of(variable.get_metadata().get("role"))
        if dtype is None or isinstance(variable, Kept) or not jnp.issubdtype(variable.dtype, jnp.floating):
            return variable
        return jax.tree.map(lambda value: value.astype(dtype), variable)

    return jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
