"""What a parameter is for: a closed list, read wherever parameters are treated differently."""

from typing import Literal, get_args

Role = Literal[
    "router",  # kernels and biases of a router, of its noise, and Soft MoE's phi: who gets a token depends on them
    "correction",  # a router's selection-only bias: stored, never trained, kept in fp32
    "expert",  # matrices and biases of routed experts
    "shared",  # those of shared experts and of dense layers, laid out as one expert's
    "soft_expert",  # layers of Soft MoE's experts
    "gate",  # the gate of shared experts, the scale of Soft MoE's logits
    "attention",
    "norm",  # scales and biases of norms, of heads too
    "embedding",
    "head",
]
ROLES: tuple[str, ...] = get_args(Role)
