"""Dtypes of parameters, arithmetic and experts, as one contract."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from jax_moe.config.checks import require
from jax_moe.config.parameters import Role

Dtype = Literal["float64", "float32", "bfloat16"]
CastExperts = Literal["at_use", "at_once"]
NEVER_CAST: frozenset[Role | None] = frozenset(("router", "correction"))  # a rounded router chooses other experts
CAST_AT_USE: frozenset[Role | None] = frozenset(("expert", "shared"))  # in the dispatcher


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a model, in jmp's terms: params, compute, output.

    Routing has no field. Scores, weights of choices, sums over choices and the routers' losses are always fp32 or
    wider. The router's linear map has the dtype that its contract names (`RouterConfig.dtype`, fp32 by default).
    """

    params: Dtype = "float32"  # of the stored ("master") weights, gradients and optimizer moments
    compute: Dtype = "float32"  # of activations and operands of matrix products
    norms: Dtype = "float32"  # of scales and biases of norms, which compute in fp32 or wider and round once
    output: Dtype = "float32"  # of the logits
    cast_experts: CastExperts = "at_use"  # in the dispatcher, which sums gradients in fp32; or beforehand, as a copy

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            require(value in allowed, field.name, value, "one of " + ", ".join(map(repr, allowed)))

    def dtype_of(self, role: Role | None) -> Dtype | None:
        """The dtype to which weights of a role are cast for a call; None: they keep their stored dtype."""
        if role in NEVER_CAST or (role in CAST_AT_USE and self.cast_experts == "at_use"):
            return None
        return self.norms if role == "norm" else self.compute


PRECISIONS = {"float32": Precision(), "mixed": Precision(compute="bfloat16")}
