"""`jax-moe inspect`: what is in a checkpoint."""

import jax
import numpy as np

from jax_moe.cli import Inspect
from jax_moe.commands.common import summary
from jax_moe.porting.checkpoint import load
from jax_moe.porting.describe import describe
from jax_moe.porting.files import read_state


def inspect(command: Inspect) -> int:
    """Prints what is in a checkpoint; of a file that is no known family, its names. Status 1 if it would not load."""
    fault = None
    with jax.enable_x64(True):
        try:
            checkpoint = load(command.path, command.choices, allow_nonfinite=True)
            arrays = checkpoint.weights if command.path.is_dir() else checkpoint.state()
            print("\n".join([summary(checkpoint), *describe(checkpoint.config)]))
            if checkpoint.characters is not None:
                print(f"characters: {checkpoint.characters!r}")
        except ValueError as error:
            if command.path.is_dir():
                raise
            fault, arrays = error, read_state(command.path)
    width = max(map(len, arrays), default=0)
    for name, value in arrays.items():
        note = "" if value.dtype.kind in "iub" or np.isfinite(value).all() else "  not finite"
        print(f"{name:{width}}  {value.dtype}  {list(value.shape)}{note}")
    if fault is not None:
        raise fault
    return 0
