"""What a parameter declares: its dims, and its role, from a closed list."""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal[
    "router",  # kernels and biases of a router, of its noise, and Soft MoE's phi: who gets a token depends on them
    "correction",  # a router's selection-only bias, or its table of tokens: stored, never trained, kept in its dtype
    "expert",  # matrices and biases of routed experts
    "shared",  # those of shared experts and of dense layers, laid out as one expert's
    "soft_expert",  # layers of Soft MoE's experts
    "gate",  # the gate of shared experts, the scale of Soft MoE's logits
    "projection",  # maps around the routed experts, into their width and out of it
    "attention",
    "norm",  # scales and biases of norms, of heads too
    "embedding",
    "head",
]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Declared:
    """A stored array: shape, dims in the letters of `jax_moe/dims.py`, role. Dims or role None: not declared."""

    shape: tuple[int, ...]
    dims: str | None = None
    role: Role | None = None

    @property
    def letters(self) -> tuple[str, ...]:
        """A word per dim; empty if no dims are declared."""
        return tuple((self.dims or "").split())
