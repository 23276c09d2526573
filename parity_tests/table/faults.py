"""Planted faults: each breaks the JAX side of a case in one way; the named columns must fail and say where."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_moe.dispatch
import jax_moe.routing
from jax_moe.config.moe import MoEConfig, Priority
from jax_moe.dims import Array
from jax_moe.moe import MoE
from parity_tests.table.sides import Pair, precision

Plant = Callable[[Pair], AbstractContextManager]


@dataclass(frozen=True)
class Fault:
    """A fault, the cases in which it must be caught, and a pattern for the message of each failing column."""

    name: str
    plant: Plant
    cases: tuple[str, ...]
    red: dict[str, str]


@contextmanager
def _edited(pair: Pair, edit: Callable[[nnx.Module], None]) -> Iterator[None]:
    with precision(pair.dtype):
        edit(pair.jax.module)
        pair.jax.use(pair.jax.module)
    yield


def weights(edit: Callable[[MoE], None]) -> Plant:
    """A fault in the weights."""
    return lambda pair: _edited(pair, edit)


def contract(change: Callable[[MoEConfig], MoEConfig]) -> Plant:
    """A fault in how the contract is interpreted."""

    def edit(module: nnx.Module) -> None:
        module.config = change(module.config)

    return lambda pair: _edited(pair, edit)


def patched(target: object, name: str, wrong: Callable) -> Plant:
    """A fault in the code: a function is replaced by wrong(function)."""
    return lambda pair: mock.patch.object(target, name, wrong(getattr(target, name)))


def swap_experts(layer: MoE) -> None:
    """Exchanges experts 0 and 1."""
    for value in vars(layer.experts).values():
        if isinstance(value, nnx.Param):
            order = jnp.array([1, 0, *range(2, value.shape[0])])
            value[...] = value[...][order]


def scale_router(layer: MoE) -> None:
    """Scales the router by 1.01."""
    layer.router.kernel[...] = 1.01 * layer.router.kernel[...]


def exchange_gate_and_up(layer: MoE) -> None:
    """Exchanges gate and up of every expert."""
    gate, up = layer.experts.gate[...], layer.experts.up[...]
    layer.experts.gate[...], layer.experts.up[...] = up, gate


def capacity_off_by(number: int) -> Plant:
    """Queues that are too long or too short by `number`."""
    return patched(MoEConfig, "expert_capacity", lambda right: lambda config, size: right(config, size) + number)


def softmax_after(config: MoEConfig) -> MoEConfig:
    """A softmax over the chosen logits, not over all."""
    return dataclasses.replace(config, router=dataclasses.replace(config.router, order="select_then_softmax"))


def higher_index_wins(right: Callable) -> Callable:
    """Ties go to the higher expert index: experts are considered in reverse."""

    def wrong(score_GSE: Array, config: MoEConfig, correction_bias_E: Array | None = None, *more: Any) -> Array:
        bias = None if correction_bias_E is None else correction_bias_E[::-1]
        reversed_too = (None if value is None else value[..., ::-1] for value in more)
        return config.num_experts - 1 - right(score_GSE[..., ::-1], config, bias, *reversed_too)

    return wrong


def last_come_first_served(right: Callable) -> Callable:
    """Queues are filled from the end: tokens, and each token's choices, are considered in reverse."""

    def wrong(
        expert_GSK: Array, weight_GSK: Array, num_experts: int, priority: Priority, mask_GS: Array | None = None
    ) -> Array:
        mask = None if mask_GS is None else mask_GS[:, ::-1]
        sign = -1 if priority in ("probability", "batch") else 1
        return right(expert_GSK[:, ::-1, ::-1], sign * weight_GSK[:, ::-1, ::-1], num_experts, priority, mask)[
            :, ::-1, ::-1
        ]

    return wrong


def padding_counts(right: Callable) -> Callable:
    """Queues that give slots to padding."""
    return lambda expert, weight, num_experts, priority, mask=None: right(expert, weight, num_experts, priority, None)


def renormalise_dropped(config: MoEConfig) -> MoEConfig:
    """A dropped choice's weight is given to the others."""
    assert config.capacity is not None
    return config.with_capacity(
        config.capacity.factor, renormalise_after_drop=not config.capacity.renormalise_after_drop
    )


@contextmanager
def zero_a_gradient_row(pair: Pair) -> Iterator[None]:
    """Zeroes a row of the first gradient that has a non-zero row."""
    gradients = pair.jax_outcome.parameter_gradients
    name = max(
        gradients, key=lambda name: float(np.abs(gradients[name][0]).max()) if gradients[name].ndim == 2 else 0.0
    )
    gradients[name][0] = 0
    yield


@contextmanager
def zero_an_input_gradient_row(pair: Pair) -> Iterator[None]:
    """Zeroes the gradient of a token."""
    gradient = pair.jax_outcome.input_gradient["x"]
    gradient[np.unravel_index(np.abs(gradient).argmax(), gradient.shape)[:2]] = 0
    yield


OVERFLOWS = tuple(f"overflow, {p} order" for p in ("token", "choice", "probability", "batch"))
CHOICES = {"experts and slots": r"experts and slots: (expert|slot)\["}
SLOTS = {"experts and slots": r"experts and slots: slot\["}
GRADIENTS = {"parameter gradients": r"parameter gradients: error .* at (router|experts)\."}
OUTPUT = {"forward": r"forward: error .* at y\["}

FAULTS = [
    Fault("experts swapped", weights(swap_experts), ("makemoe", "mixtral", "deepseek_v3", "K = E"), {
        **OUTPUT, **GRADIENTS, "ten AdamW steps": r"after 10 AdamW steps: error .* at experts\.\d\.",
        "fp32 forward": r"at y\[",
    }),
    Fault("router scaled by 1.01", weights(scale_router), ("plain top-k", "mixtral", "switch", "vmoe", "deepseek_v3"), {
        **OUTPUT, "statistics": r"statistics: error", "loss gradients": r"loss gradients: error",
        "fp32 forward": r"at y\[",
    }),
    Fault("gate and up exchanged", weights(exchange_gate_and_up), ("mixtral", "qwen2_moe", "gpt_oss", "granite_moe"), {
        **OUTPUT, "parameter gradients": r"at experts\.\d\.(gate|up|down)\.", "input gradient": r"at x\[",
    }),
    Fault("capacity one too long", capacity_off_by(1), (*OVERFLOWS, "padding, fixed groups"), {**SLOTS, **OUTPUT}),
    Fault(
        "capacity one too short", capacity_off_by(-1), (*OVERFLOWS, "makemoe", "sequence groups"), {**SLOTS, **OUTPUT}
    ),
    Fault("softmax after top-k instead of before", contract(softmax_after), ("qwen2_moe", "olmoe", "vmoe", "switch"), {
        **OUTPUT, **GRADIENTS,
    }),
    Fault("one row of a gradient zeroed", zero_a_gradient_row, (
        "makemoe", "mixtral", "soft moe, deep", "makemoe model",
    ), {
        "parameter gradients": r"parameter gradients: error .* at \S+\[0, \d+\]: 0\.0,",
    }),
    Fault("the gradient of one token zeroed", zero_an_input_gradient_row, (
        "padding", "attention, makemoe", "block, soft moe",
    ), {"input gradient": r"at x\[\d+, \d+, \d+\]: 0\.0,"}),
    Fault("a tie to the higher index", patched(jax_moe.routing, "select_experts", higher_index_wins), (
        "equal logits", "equal logits, probability order", "bf16-rounded logits", "bf16-rounded logits, clusters",
    ), {"experts and slots": r"experts and slots: expert\[", "forward": "forward: error"}),
    Fault("drop order reversed", patched(jax_moe.dispatch, "queue_positions", last_come_first_served), (
        *OVERFLOWS, "everybody chooses one, capacity", "sequence groups",
    ), {**SLOTS, **OUTPUT}),
    Fault("dropped weight renormalised", contract(renormalise_dropped), OVERFLOWS, OUTPUT),
    Fault("dropped weight not renormalised", contract(renormalise_dropped), (
        "overflow, token order, renormalised", "overflow, probability order, renormalised",
    ), OUTPUT),
    Fault(
        "padding takes slots", patched(jax_moe.dispatch, "queue_positions", padding_counts), ("padding",),
        SLOTS,
    ),
]
