"""Compiler options for tests, whose programs run once or twice: most of their time is compilation."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np


def known(options: dict[str, Any]) -> dict[str, Any] | None:
    """The options, or None if this XLA does not know them."""
    try:
        jax.jit(lambda x: x, compiler_options=options)(np.float32(0))
    except jax.errors.JaxRuntimeError:
        return None
    return options


# Three times faster into slower code: what the tests' own settings are, also for commands that run without them.
LEVEL = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
QUICK = known({**LEVEL, "xla_cpu_use_fusion_emitters": False}) or known(LEVEL)  # newer XLA has no such emitters
# XLA's defaults, for the fp32 columns of the parity table.
USUAL = {"xla_backend_optimization_level": 3}
AS_USERS = known({**USUAL, "xla_cpu_use_fusion_emitters": True}) or known(USUAL)


def by_operation() -> AbstractContextManager:
    """For programs that run once: their operations one by one, loops unrolled, nothing compiled as a whole.

    Operations are compiled too, but each once for all programs of a process, and the workers share them.
    """
    return jax.disable_jit()
