"""What of a module is stored, and what of it keeps its dtype: said by the class of each variable, never by its name."""

from typing import Any

from flax import nnx


class Kept(nnx.Variable):
    """A variable that is stored but never trained, and that no cast rounds: it keeps the dtype it has."""


def stored_state(module: Any) -> Any:
    """What a checkpoint of the module holds, as nnx.State: every variable but the state of random number generators."""
    return nnx.state(module, nnx.Not(nnx.RngState))


def stored_variables(module: Any) -> dict[str, nnx.Variable]:
    """{our path: variable} of what is stored."""
    return {".".join(map(str, keys)): variable for keys, variable in nnx.to_flat_state(stored_state(module))}


def kept_paths(module: nnx.Module) -> frozenset[str]:
    """Our paths of the variables that keep their dtype when a checkpoint is read as another."""
    return frozenset(path for path, variable in stored_variables(module).items() if isinstance(variable, Kept))
