"""Options for programs that run once or twice: compiling takes the time in tests, not running."""

from typing import Any

import jax
import numpy as np


def known(options: dict[str, Any]) -> dict[str, Any] | None:
    """The options, or None where XLA no longer knows them."""
    try:
        jax.jit(lambda x: x, compiler_options=options)(np.float32(0))
    except jax.errors.JaxRuntimeError:
        return None
    return options


# Five times faster into slower code; the fp32 columns of the parity table go without: they are compiled as users compile.
QUICK = known({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})
