"""What a contestant of a benchmark is, how jax makes it of a function, and how far two are apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# Largest difference divided by the largest number, of the answer and of every gradient; measured 2e-6 and 1e-2.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2}
Values = dict[str, jax.Array]


@dataclass(frozen=True)
class Contestant:
    """The timed functions. `values` returns answer and gradients; None if the contestant computes something else.

    `peak` returns the bytes of a forward with backward: weights, input, probe, gradients and everything between; None
    where nothing counts them.
    """

    forward: Callable[[], object]
    both: Callable[[], object]
    values: Callable[[], Values] | None
    peak: Callable[[], int | None] = lambda: None


def jitted(
    function: Callable[[dict, jax.Array], jax.Array], weights: dict, x: Any, probe: Any, named: bool = True
) -> Contestant:
    """A contestant for `function(weights, x) -> answer`; gradients are those of sum(answer * probe)."""
    forward = jax.jit(function).lower(weights, x).compile()
    loss = jax.value_and_grad(lambda w, x, probe: (function(w, x) * probe).sum(), argnums=(0, 1))
    both = jax.jit(loss).lower(weights, x, probe).compile()

    def values() -> Values:
        gradients, g_x = both(weights, x, probe)[1]
        return {"answer": forward(weights, x), "x": g_x, **gradients}

    def peak() -> int | None:
        memory = both.memory_analysis()
        if memory is None:
            return None
        arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
        return int(arguments + outputs + memory.temp_size_in_bytes - memory.alias_size_in_bytes)

    return Contestant(
        lambda: jax.block_until_ready(forward(weights, x)), lambda: jax.block_until_ready(both(weights, x, probe)),
        values if named else None, peak,
    )


def difference(found: Values, expected: Values) -> tuple[float, str]:
    """(largest difference divided by the largest expected number, the name of the array where it occurs).

    Infinite if a value is not finite. Computed on the device, in fp32.
    """
    return max((float(_relative_error(found[name], a)), name) for name, a in expected.items())


@jax.jit
def _relative_error(found: jax.Array, expected: jax.Array) -> jax.Array:
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    finite = jnp.isfinite(found).all() & jnp.isfinite(expected).all()
    distance, scale = jnp.abs(found - expected).max(), jnp.abs(expected).max()
    return jnp.where(finite, jnp.where(distance == 0, 0, distance / scale), jnp.inf)
