"""A parameter declares its dims and its role once, as metadata of its variable, which every nnx transform keeps."""

from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from jax_moe.config.checks import require
from jax_moe.config.parameters import ROLES, Declared, Role
from jax_moe.dims import Array
from jax_moe.stored import stored_variables

Module = TypeVar("Module", bound=nnx.Module)


def parameter(value: Array, dims: str, role: Role, kind: type[nnx.Variable] = nnx.Param) -> Any:
    """A variable with that value, dims ("E D F") and role. Raises ValueError for dims that do not fit the shape."""
    return kind(value, **_said(value.shape, dims, role))


def declare(layer: Module, role: Role, **dims: str) -> Module:
    """A flax layer with dims declared for its variables: `declare(nnx.Linear(...), "head", kernel="D V", bias="V")`."""
    for name, letters in dims.items():
        variable = getattr(layer, name)
        variable.set_metadata(**_said(variable.shape, letters, role))
    return layer


def _said(shape: tuple[int, ...], dims: str, role: Role) -> dict[str, Any]:
    require(role in ROLES, "role", role, "one of " + ", ".join(ROLES))
    require(len(dims.split()) == len(shape), "dims", dims, f"a word for each dim of shape {shape}")
    return {"dims": dims, "role": role}


def stacked(make: Callable[[nnx.Rngs], Module], rngs: nnx.Rngs, count: int, dim: str) -> Module:
    """`count` modules in one: every array and its dims with `dim` leading."""
    module = nnx.vmap(make)(rngs.split(count))
    for variable in stored_variables(module).values():
        variable.set_metadata(dims=f"{dim} {variable.get_metadata()['dims']}".rstrip())
    return module


def declared(module: Any) -> dict[str, Declared]:
    """{our path: what the array there is} of all that a module or its state stores."""
    return {path: of_variable(variable) for path, variable in stored_variables(module).items()}


def of_variable(variable: nnx.Variable) -> Declared:
    """What a variable says of itself."""
    said = variable.get_metadata()
    return Declared(tuple(variable.shape), said.get("dims"), said.get("role"))


def of_role(role: Role) -> Callable[[Any, Any], bool]:
    """A filter for `nnx.split` and `nnx.state`: the variables of that role."""
    return lambda path, variable: isinstance(variable, nnx.Variable) and of_variable(variable).role == role
