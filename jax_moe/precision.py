"""Mixed precision as one object: in which dtype weights are stored, products are computed and losses are taken.

Settings are standard library only; jax is imported where weights are cast.
"""

from typing import Any, TypeVar

from jax_moe.config.precision import PRECISIONS as PRECISIONS
from jax_moe.config.precision import Dtype, Precision

Tree = TypeVar("Tree")

# Weights of `Experts`, cast where they meet the tokens whatever they are stored in.
EXPERT_WEIGHTS = frozenset(name + end for name in ("up", "gate", "down") for end in ("", "_bias"))


def cast_to_compute(params: Tree, precision: Precision) -> Tree:
    """Weights as a call should see them: a tree of arrays with our names, a state or a module. To be used inside the loss,
    so that gradients come back in the stored dtype.

    As they are: routers (a rounded router chooses other experts), the correction bias, Soft MoE's phi, integers, and unless
    cast at once the experts. Norms become `norms`, all else `compute`; the embeddings' dtype is that of the residual stream.
    """
    import jax
    import jax.numpy as jnp

    from jax_moe.stored import Kept

    def cast(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, Kept):
            return leaf
        dtype = dtype_of(jax.tree_util.keystr(path, simple=True, separator="."), precision)
        return leaf if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda leaf: isinstance(leaf, Kept))


def dtype_of(path: str, precision: Precision) -> Dtype | None:
    """What the weight at a dotted path is cast to; None: it stays as it is."""
    parts = path.split(".")
    if "router" in parts or "phi" in parts:
        return None
    if any(part.endswith(("norm", "norms", "_ln")) for part in parts):
        return precision.norms
    if precision.cast_experts == "at_use" and EXPERT_WEIGHTS.intersection(parts):
        return None
    return precision.compute
