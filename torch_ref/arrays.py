"""Array arguments checked by name, before anything is computed: kind, shape and range."""

from typing import Any

import torch

from jax_moe.config import MoEConfig
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
from torch_ref.dims import Tensor

__all__ = [
    "Dim", "Sizes", "check_choices", "check_kind", "check_moe_arrays", "check_vocabulary", "checked", "checked_input",
    "dims_of_settings",
]


def _holds(value: Tensor) -> str:
    if value.dtype == torch.bool:
        return "bool"
    return "floating" if value.is_floating_point() else "complex" if value.is_complex() else "integer"


def check_kind(name: str, value: Any) -> Tensor:
    """The tensor. Raises ValueError for other types, and for a dtype that does not fit the name."""
    kind, dims = kind_of(name), role_and_dims(name)[1]
    if not isinstance(value, Tensor):
        asked = f"a tensor of {kind}s [{', '.join(dims)}]"
        raise ValueError(f"{name} is a {type_name(value)}: must be {asked}; torch.as_tensor converts it")
    check_holds(name, value.dtype, _holds(value))
    return value


def checked(sizes: Sizes, leading: str = "", **arrays: Any) -> None:
    """Raises ValueError for a tensor whose kind or shape does not fit its name, `leading` dims first; None passes."""
    for name, value in arrays.items():
        if value is not None:
            check_shape(name, check_kind(name, value).shape, sizes, leading)


def checked_input(name: str, value: Any, model_dim: int | None = None) -> dict[str, Dim]:
    """The dims of the main input, which the others share. Raises ValueError for another kind, rank or width."""
    sizes = dims_of(name, check_kind(name, value).shape)
    if model_dim is not None:
        check_width(name, value.shape[-1], model_dim)
    return sizes


def check_choices(
    name: str, expert: Tensor, num_experts: int, mask: Tensor | None = None, different: bool = True
) -> None:
    """Raises ValueError unless every token's K choices are different experts of 0 to num_experts - 1.

    Choices of padding are not checked. Kinds and shapes are checked elsewhere.
    """
    rows = expert.long().flatten(0, -2) if mask is None else expert.long()[mask.expand(expert.shape[:-1])]
    outside = rows[(rows < 0) | (rows >= num_experts)]
    again = [rows[(rows[:, :k] == rows[:, k : k + 1]).any(dim=1), k] for k in range(1, rows.shape[-1]) if different]
    twice = torch.cat(again) if again else outside[:0]
    check_choice_values(name, outside.tolist(), twice.tolist(), num_experts, rows.shape[-1])


def check_vocabulary(tokens_BT: Tensor, vocab_size: int) -> None:
    """Raises ValueError for a token outside the vocabulary."""
    if tokens_BT.numel():
        check_token_range(int(tokens_BT.min()), int(tokens_BT.max()), vocab_size)


def check_moe_arrays(config: MoEConfig, x_BTD: Any, **arrays: Any) -> None:
    """Raises ValueError unless the input of a sparse layer and its other arrays fit."""
    sizes = checked_input("x_BTD", x_BTD, config.model_dim)
    checked(sizes | dims_of_settings(config, E="num_experts", K="top_k", I="network_dim"), **arrays)
    check_state(config.router.takes_state, arrays.get("router_state_BTI") is not None)
    if arrays.get("expert_BTK") is not None:
        check_choices("expert_BTK", arrays["expert_BTK"], config.num_experts, arrays.get("mask_BT"))
    tokens_BT, mask_BT = arrays.get("tokens_BT"), arrays.get("mask_BT")
    check_table(config.router.table_tokens, tokens_BT is not None, arrays.get("expert_BTK") is not None)
    if tokens_BT is not None:
        check_vocabulary(tokens_BT if mask_BT is None else tokens_BT[mask_BT], config.router.table_tokens)
