"""Dtypes of parameters, arithmetic and experts, as one contract."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from jax_moe.config.checks import require

Dtype = Literal["float64", "float32", "bfloat16"]
CastExperts = Literal["at_use", "at_once"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a model, in jmp's terms: params, compute, output.

    Routing has no field. Scores, weights of choices, sums over choices and the routers' losses are fp32 or wider whatever
    this says, and the router's linear map is in what its contract names (`RouterConfig.dtype`, fp32 by default).
    """

    params: Dtype = "float32"  # of the stored ("master") weights, and so of gradients and optimizer moments
    compute: Dtype = "float32"  # of activations and of the operands of products
    norms: Dtype = "float32"  # of norms' scales and biases; norms compute in fp32 or wider and round their answer once
    output: Dtype = "float32"  # of the logits, before a loss reads them
    cast_experts: CastExperts = "at_use"  # by the dispatcher, which adds up gradients in fp32; or beforehand, in one copy

    def __post_init__(self) -> None:
        for one in fields(self):
            value, allowed = getattr(self, one.name), get_args(one.type)
            require(value in allowed, one.name, value, "one of " + ", ".join(map(repr, allowed)))


PRECISIONS = {"float32": Precision(), "mixed": Precision(compute="bfloat16")}
