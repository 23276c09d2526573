"""Array arguments checked by name, before anything is computed: kind, shape and, for concrete values, range.

Under jit shapes are checked while tracing, at no cost. A traced value has no numbers yet: an index out of range then
gives NaN, never another expert's answer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe.config.moe import MoEConfig
from jax_moe.dims import Array
from jax_moe.shapes import (
    Dim,
    Sizes,
    check_choice_values,
    check_holds,
    check_shape,
    check_state,
    check_table,
    check_token_range,
    check_width,
    dims_of,
    dims_of_settings,
    kind_of,
    role_and_dims,
    type_name,
)

DTYPES: dict[str, Any] = {"bool": jnp.bool_, "integer": jnp.integer, "floating": jnp.floating}


def check_kind(name: str, value: Any) -> Array:
    """The value as a JAX array. Raises ValueError for other types, and for a dtype that does not fit the name."""
    kind, dims = kind_of(name), role_and_dims(name)[1]
    if not isinstance(value, jax.Array | np.ndarray | np.generic) and not hasattr(value, "__jax_array__"):
        asked = f"an array of {kind}s [{', '.join(dims)}]" if dims else f"an array of one {kind}"
        cure = "np.asarray converts lists of equal length" if isinstance(value, list | tuple) else "of jax or numpy"
        raise ValueError(f"{name} is a {type_name(value)}: must be {asked}; {cure}")
    holds = next((word for word, dtype in DTYPES.items() if jnp.issubdtype(value.dtype, dtype)), "")
    check_holds(name, value.dtype, holds)
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def checked(sizes: Sizes, leading: str = "", **arrays: Any) -> dict[str, Any]:
    """The arrays that are not None, by name, each checked for kind and shape; `leading` dims come first in each shape.

    Raises ValueError, such as "mask_BT has shape (1, 5): must be (2, 5), the B and T of x_BTD".
    """
    found = {name: check_kind(name, value) for name, value in arrays.items() if value is not None}
    for name, value in found.items():
        check_shape(name, value.shape, sizes, leading)
    return found


def checked_input(name: str, value: Any, model_dim: int | None = None) -> tuple[Array, dict[str, Dim]]:
    """The main input and its dims, which the other arrays share. Raises ValueError for another kind, rank or width."""
    value = check_kind(name, value)
    sizes = dims_of(name, value.shape)
    if model_dim is not None:
        check_width(name, value.shape[-1], model_dim)
    return value, sizes


def visible(value: Any) -> np.ndarray | None:
    """The numbers of a concrete array on this process's devices; None for a traced or remote array."""
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(value)


def check_choices(name: str, expert: Any, num_experts: int, mask: Any = None, different: bool = True) -> None:
    """Raises ValueError unless every token's K choices are different experts of 0 to num_experts - 1, where visible.

    Choices of padding are not checked. Shapes are checked elsewhere: a mask of another shape is ignored here.
    """
    values, real = visible(expert), None if mask is None else visible(mask)
    if values is None or not values.size or (mask is not None and (real is None or real.dtype != bool)):
        return
    if real is not None and real.shape != values.shape[-1 - real.ndim : -1]:
        return
    rows = values.reshape(-1, values.shape[-1]).astype(np.int64)
    if real is not None:
        rows = rows[np.broadcast_to(real, values.shape[:-1]).reshape(-1)]
    outside, ranked = rows[(rows < 0) | (rows >= num_experts)], np.sort(rows, axis=-1)
    twice = ranked[:, 1:][ranked[:, 1:] == ranked[:, :-1]] if different else ()
    check_choice_values(name, outside, twice, num_experts, rows.shape[-1])


def check_vocabulary(tokens_BT: Any, vocab_size: int) -> None:
    """Raises ValueError for a token outside the vocabulary, where tokens are visible."""
    values = None if tokens_BT is None else visible(tokens_BT)  # in numpy, so that a constant inside jit is checked too
    if values is not None and values.size:
        check_token_range(int(values.min()), int(values.max()), vocab_size)


def moe_arrays(config: MoEConfig, x_BTD: Any, **arrays: Any) -> tuple[Array, dict[str, Any]]:
    """The checked input of a sparse layer and by name those of its other arrays that are not None."""
    x_BTD, sizes = checked_input("x_BTD", x_BTD, config.model_dim)
    found = checked(sizes | dims_of_settings(config, E="num_experts", K="top_k", I="network_dim"), **arrays)
    check_state(config.router.takes_state, "router_state_BTI" in found)
    if "expert_BTK" in found:
        check_choices("expert_BTK", arrays["expert_BTK"], config.num_experts, arrays.get("mask_BT"))
    check_table(config.router.table_tokens, "tokens_BT" in found, "expert_BTK" in found)
    if "tokens_BT" in found:
        tokens, mask = visible(arrays["tokens_BT"]), arrays.get("mask_BT")
        real = None if mask is None else visible(mask)
        if mask is None or real is not None:
            check_vocabulary(tokens if tokens is None or real is None else tokens[real], config.router.table_tokens)
    return x_BTD, found


def check_limit(limit: Any, capacity: int) -> Array | None:
    """`capacity_limit` as an array. Raises ValueError unless it is an integer of 0 to the capacity, where visible."""
    if limit is None:
        return None
    limit = checked({}, capacity_limit=jnp.asarray(limit) if isinstance(limit, int) else limit)["capacity_limit"]
    value = visible(limit)
    if value is not None and not 0 <= value <= capacity:
        raise ValueError(f"capacity_limit={value}: must be 0 to {capacity}, the slots of an expert")
    return limit
