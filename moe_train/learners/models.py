"""The models that the JAX learner trains: a makeMoE, or a decoder from a folder of `save_pretrained`."""

import math
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

import jax_moe
from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import MoEConfig
from jax_moe.parameters import declared
from jax_moe.porting.formats.hf_folder import open_folder
from jax_moe.sharding.rules import replicated, split_tree
from moe_train.run.folder import write_weights

Tree = dict[str, Any]  # plain nested dicts of arrays
PRETRAINED = "pretrained"


class Model(Protocol):
    """A model whose modules have `run(tokens_BT, key=, training=, remat=)` and suit `jax_moe.generate`."""

    @property
    def moe(self) -> MoEConfig:
        """The contract of the model's mixtures."""

    @property
    def num_mixtures(self) -> int:
        """The number of layers with a mixture, L of the statistics."""

    @property
    def balance_loss_weight(self) -> float:
        """The weight of the balance loss if the settings leave it to the model."""

    @property
    def fits_alone(self) -> bool:
        """Whether one device surely holds the model, so that it can be sampled without the others."""

    def start(self, key: Array, mesh: Mesh) -> tuple[nnx.GraphDef, Tree, Any]:
        """(structure, initial weights split over the mesh, variables that are not trained)."""

    def write(self, module: nnx.Module, folder: Path) -> None:
        """Writes the trained model into a run's folder, whole or not at all."""


class FreshMakeMoE:
    """`jax_moe.MakeMoE` from random weights, or from those of `weights`; written under makeMoE's names."""

    balance_loss_weight = 0.0
    fits_alone = True

    def __init__(self, config: MakeMoEConfig, weights: jax_moe.MakeMoE | None = None):
        self.config, self.moe, self.num_mixtures, self.weights = config, config.moe, config.num_layers, weights

    def start(self, key: Array, mesh: Mesh) -> tuple[nnx.GraphDef, Tree, Any]:
        def make() -> jax_moe.MakeMoE:
            return jax_moe.MakeMoE(self.config, rngs=nnx.Rngs(key), param_dtype=jnp.dtype("float32"))

        def split(model: jax_moe.MakeMoE) -> tuple[Tree, Any]:
            params, rest = nnx.split(model, nnx.Param, ...)[1:]
            return nnx.to_pure_dict(params), rest

        shapes = nnx.eval_shape(make)
        parts = split_tree(mesh, split(shapes)[0], declared(shapes))
        if self.weights is None:
            params, rest = jax.jit(lambda: split(make()), out_shardings=(parts, replicated(mesh)))()
            return nnx.graphdef(shapes), params, rest
        stored, rest = split(self.weights)
        return nnx.graphdef(shapes), jax.device_put(jax.tree.map(lambda x: x.astype(jnp.float32), stored), parts), rest

    def write(self, module: nnx.Module, folder: Path) -> None:
        write_weights(folder, jax_moe.to_torch(module))


class Pretrained:
    """`jax_moe.Decoder` from a folder: trained in fp32, each tensor written in its dtype in that folder."""

    fits_alone = False

    def __init__(self, directory: Path):
        self.directory = directory
        found = open_folder(directory)
        assert found.plan is not None
        self.config, self.model_type = found.config, found.family.name
        self.num_parameters = sum(math.prod(found.tensors[piece.theirs].shape) for piece in found.plan.pieces)
        self.dtypes = {piece.ours: np.dtype(found.tensors[piece.theirs].dtype) for piece in found.plan.pieces}
        self.moe, self.num_mixtures = self.config.moe, len(self.config.moe_layers)
        self.balance_loss_weight = self.config.balance_loss_weight

    def start(self, key: Array, mesh: Mesh) -> tuple[nnx.GraphDef, Tree, Any]:
        model = jax_moe.load_pretrained(self.directory, dtype="float32", mesh=mesh)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return graphdef, nnx.to_pure_dict(params), rest

    def write(self, module: nnx.Module, folder: Path) -> None:
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)

        def stored(path: Any, value: Array) -> Array:
            return value.astype(self.dtypes[jax.tree_util.keystr(path, simple=True, separator=".")])

        params = jax.tree_util.tree_map_with_path(stored, nnx.to_pure_dict(params))
        try:
            jax_moe.save_pretrained(nnx.merge(graphdef, params, rest), folder / PRETRAINED, overwrite=True)
        except ValueError as error:  # not a wrong request: the disk is full, or another file is in the way
            raise OSError(f"the model is in {folder / 'checkpoints'} but could not be written: {error}") from None
