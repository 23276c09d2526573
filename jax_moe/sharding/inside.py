"""What a program that runs on a mesh says of its arrays: where activations lie, and when weights are put together.

All look at the mesh that `jax.set_mesh` has set around the call and do nothing without one. They change where numbers
are, never which: XLA would find some way by itself, but might move activations where weights are cheaper to move.
"""

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from jax_moe.dims import Array
from jax_moe.parameters import of_variable
from jax_moe.sharding.mesh import DATA_AXIS, SEQUENCE_AXIS
from jax_moe.sharding.rules import RULES, batch_split, position_devices, weight_split

Module = TypeVar("Module", bound=nnx.Module)
WITHOUT_DATA = {letter: axis for letter, axis in RULES.items() if axis != DATA_AXIS}


def as_batch(x: Array) -> Array:
    """Tokens or activations [B, T, ...] with sequences and positions split over the mesh as those of a batch are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, batch_split(mesh, *x.shape[:2]).spec)


def devices_of_positions(num_positions: int) -> int:
    """The devices that share so many positions."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else position_devices(mesh, num_positions)


def positions_split(x: Array, dim: int = 1) -> Array:
    """The array with this dim split over the sequence axis, and the others as XLA has them."""
    return _with_positions(x, dim, SEQUENCE_AXIS)


def positions_whole(x: Array, dim: int = 1) -> Array:
    """The array with this dim whole on every device, and the others as XLA has them."""
    return _with_positions(x, dim, None)


def _with_positions(x: Array, dim: int, axis: str | None) -> Array:
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[dim] = axis
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def together(tree: Any) -> Any:
    """Variables of a tree with what lies on the data axis put together on every device of it, for their use in a layer.

    The gradient's way back is a sum over the data axis, of which each device keeps its part. A variable of one layer
    may still be declared with the leading dims of a stack.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(DATA_AXIS, 1) == 1:
        return tree

    def gathered(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return variable
        said, value = of_variable(variable), variable[...]
        letters = said.letters[len(said.letters) - value.ndim :]
        if "D" not in letters:
            return variable
        array = type(said)(tuple(value.shape), " ".join(letters), said.role)
        spec = weight_split(mesh, array, WITHOUT_DATA).spec
        return variable.replace(jax.lax.with_sharding_constraint(value, spec or PartitionSpec()))

    return jax.tree.map(gathered, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def alone_together(module: Module) -> Module:
    """A model whose variables outside stacks of layers are put together, as `together` says; those of a layer are
    where the layer is run.
    """
    graphdef, alone, stacked = nnx.split(module, _is_alone, ...)
    return nnx.merge(graphdef, together(alone), stacked)


def _is_alone(path: Any, variable: Any) -> bool:
    return not (isinstance(variable, nnx.Variable) and of_variable(variable).letters[:1] == ("L",))
