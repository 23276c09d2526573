"""The training step of a decoder on a mesh, without numbers: AdamW, fp32 master weights, bf16 products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import jax_moe
from jax_moe.config.decoder import DecoderConfig
from jax_moe.losses import next_token_loss, pool_balance_loss
from jax_moe.parameters import declared
from jax_moe.porting.state_dict import abstract_decoder
from jax_moe.precision import PRECISIONS, cast_to_compute
from jax_moe.sharding.rules import batch_split, check_divides, replicated, split_tree


def training_step(
    config: DecoderConfig, mesh: Mesh, batch: int, length: int, remat: str
) -> tuple[Callable, tuple, Any]:
    """(the step, its abstract arguments placed on the mesh, where its results lie)."""
    module = abstract_decoder(config)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    params, arrays, precision = nnx.to_pure_dict(params), declared(module), PRECISIONS["mixed"]
    check_divides(mesh, arrays)
    optimizer = jax_moe.adamw_as_torch(1e-4)

    def loss_of(params: Any, rest: Any, tokens_BT1: jax.Array) -> jax.Array:
        model = cast_to_compute(nnx.merge(graphdef, params, rest), precision)
        output = model.run(tokens_BT1[:, :-1], training=True, remat=remat)
        loss = next_token_loss(output.logits_BTV.astype(precision.output), tokens_BT1[:, 1:])
        return loss + config.balance_loss_weight * pool_balance_loss(output.stats, config.moe)

    def step(state: Any, rest: Any, tokens_BT1: jax.Array) -> tuple[Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(state["params"], rest, tokens_BT1)
        update, moments = optimizer.update(gradient, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], update), "optimizer": moments}, loss

    def placed(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, where)

    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), params)
    state = {"params": params, "optimizer": jax.eval_shape(optimizer.init, params)}
    where = {name: split_tree(mesh, tree, arrays) for name, tree in state.items()}
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    whole = replicated(mesh)
    arguments = (
        placed(state, where), placed(rest, jax.tree.map(lambda _: whole, rest)),
        placed(tokens, batch_split(mesh, batch)),
    )
    return step, arguments, (where, whole)
