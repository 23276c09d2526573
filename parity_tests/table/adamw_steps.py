"""Ten AdamW steps of a case in each framework, with torch's defaults."""

import functools

import jax
import numpy as np
import optax
import torch
from flax import nnx

from jax_moe.optimizers import adamw_as_torch
from parity_tests.shared.quick import QUICK
from parity_tests.table.inputs import generator
from parity_tests.table.sides import Pair, array, output_shape, precision, probe

STEPS, LEARNING_RATE = 10, 1e-2


def step_inputs(pair: Pair, step: int) -> dict[str, np.ndarray]:
    """The case's inputs, its vectors changed a little in every step."""
    given = dict(pair.inputs)
    if "x_BTD" in given:
        given["x_BTD"] = given["x_BTD"] + 0.1 * generator(pair.case, f"step {step}").normal(size=given["x_BTD"].shape)
    return given


def jax_trajectory(pair: Pair) -> dict[str, np.ndarray]:
    """Parameters after the steps, under PyTorch's names."""
    side, shape = pair.jax, output_shape(pair.case)
    with precision(pair.dtype):
        optimizer = adamw_as_torch(LEARNING_RATE)
        quick = functools.partial(jax.jit, compiler_options=QUICK)
        params, state = side.params, quick(optimizer.init)(side.params)

        @quick
        def update(gradients: nnx.State, state: optax.OptState, params: nnx.State) -> tuple:
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        for step in range(STEPS):
            gradients, _ = side.raw(step_inputs(pair, step), probe(pair.case, shape, step), 1.0, params)[-1]
            params, state = update(gradients, state, params)
    return side.named(params)


def torch_trajectory(pair: Pair) -> dict[str, np.ndarray]:
    """The same steps in a plain PyTorch loop."""
    shape, side = output_shape(pair.case), pair.torch
    before = {name: value.clone() for name, value in side.module.state_dict().items()}
    optimizer = torch.optim.AdamW(side.module.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        _, _, weighed, losses, _ = side.losses(step_inputs(pair, step), probe(pair.case, shape, step))
        (weighed if losses is None else weighed + losses).backward()
        optimizer.step()
    after = {name: array(value) for name, value in side.module.named_parameters()}
    side.module.load_state_dict(before)
    return after
