"""Options for programs that run once or twice: compiling takes the time in tests, not running."""

from typing import Any

import jax
import numpy as np


def known(options: dict[str, Any]) -> dict[str, Any] | None:
    """The options, or None where this XLA does not know them."""
    try:
        jax.jit(lambda x: x, compiler_options=options)(np.float32(0))
    except jax.errors.JaxRuntimeError:
        return None
    return options


LEVEL = {"xla_backend_optimization_level": 0}
# Compiles five times faster, into slower code; the parity table's fp32 columns are compiled as users compile them.
# Newer XLA has no fusion emitters to leave out.
QUICK = known({**LEVEL, "xla_cpu_use_fusion_emitters": False}) or known(LEVEL)
