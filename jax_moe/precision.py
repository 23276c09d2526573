"""Mixed precision: weights cast by role, as `Precision` says. jax and flax are imported at the first call."""

from typing import Any, TypeVar

from jax_moe.config.precision import PRECISIONS as PRECISIONS
from jax_moe.config.precision import Precision

Tree = TypeVar("Tree")


def cast_to_compute(params: Tree, precision: Precision, *, declared: Any = None) -> Tree:
    """A copy of a module, or of its state, with each weight cast as `Precision.dtype_of` says of its role.

    Use it inside the loss, so that gradients have the stored dtype. Routers, Soft MoE's phi, kept variables and
    integers are not cast, nor are experts unless `cast_experts` is "at_once". Norms become `norms`, all other weights
    `compute`; the embeddings' dtype is that of the residual stream. Plain arrays have no role: for them give
    `declared`, the module or `jax_moe.declared(module)`. Raises ValueError for an array without a role.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jax_moe.parameters import declared as declared_in
    from jax_moe.parameters import of_variable, path_of
    from jax_moe.stored import Kept

    known = {} if declared is None else declared_in(declared)

    def cast(keys: tuple, leaf: Any) -> Any:
        said = of_variable(leaf) if isinstance(leaf, nnx.Variable) else known.get(path_of(keys))
        if said is None:
            allowed = "in a variable of a module or its state, or named in declared=jax_moe.declared(module)"
            raise ValueError(f"params: {path_of(keys)} has no role: must be {allowed}")
        dtype = precision.dtype_of(said.role)
        if dtype is None or isinstance(leaf, Kept) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jax.tree.map(lambda value: value.astype(dtype), leaf)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
