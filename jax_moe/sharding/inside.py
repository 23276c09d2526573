"""What a program that runs on a mesh says of its arrays: where activations lie, and when weights are put together.

Both look at the mesh that `jax.set_mesh` has set around the call and do nothing without one. They change where numbers
are, never which: XLA would find some way by itself, but might move activations where weights are cheaper to move.
"""

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from jax_moe.dims import Array
from jax_moe.parameters import of_variable
from jax_moe.sharding.mesh import DATA_AXIS
from jax_moe.sharding.rules import RULES, batch_split, weight_split

Module = TypeVar("Module", bound=nnx.Module)
WITHOUT_DATA = {letter: axis for letter, axis in RULES.items() if axis != DATA_AXIS}


def by_sequence(x: Array) -> Array:
    """Activations [B, ...] with their sequences split over the mesh as those of a batch are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, batch_split(mesh, x.shape[0]).spec)


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
