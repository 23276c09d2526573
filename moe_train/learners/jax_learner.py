"""The JAX learner: a jitted step over plain trees, whose buffers are donated, split over a mesh of devices."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import jax_moe
from jax_moe.attention import attention_by
from jax_moe.config.precision import PRECISIONS
from jax_moe.losses import MoEStats, chosen_experts, next_token_loss, pool_balance_loss, tokens_per_expert
from jax_moe.models.stack import ModelOutput
from jax_moe.parameters import declared
from jax_moe.precision import cast_to_compute
from jax_moe.shapes import role_and_dims
from jax_moe.sharding.expert_parallel import exchange, exchange_in_use
from jax_moe.sharding.inside import alone_together, as_batch
from jax_moe.sharding.memory import bytes_held, numbers_on_device
from jax_moe.sharding.mesh import data_mesh, device_mesh, fitting_devices, read_mesh
from jax_moe.sharding.place import check_batch, put_batch, put_number, put_share, rows_here
from jax_moe.sharding.rules import check_divides, replicated, split_tree
from jax_moe.stored import stored_state
from moe_train.configs import TrainConfig
from moe_train.configs.settings import OptimizerSettings
from moe_train.learners.learner import Memory
from moe_train.learners.models import Model
from moe_train.learners.optimizer import make_optimizer
from moe_train.run import checkpoint
from moe_train.run.export import write_newest
from moe_train.run.keep import KEEP, Keep
from moe_train.run.metrics import Evaluation
from moe_train.run.saving import Saving
from moe_train.run.together import Processes

# Streams of the run's key, one per purpose.
INIT, STEP, EVALUATE, SAMPLE = range(4)
_USES = {"eval_train": 0, "eval_val": 1}

STATE_BYTES, GRADIENT_BYTES = 12, 4  # fp32, for each parameter: the weight and two moments; its gradient

State = dict[str, Any]  # params and optimizer, as plain nested dicts of arrays


def objective(loss: Array, stats: MoEStats, model: Model, settings: OptimizerSettings) -> Array:
    """The loss that is minimised: cross entropy plus the weighted router losses."""
    weight = model.balance_loss_weight if settings.balance_loss_weight is None else settings.balance_loss_weight
    if weight:
        loss = loss + weight * pool_balance_loss(stats, model.moe)
    if settings.router_z_loss_weight:
        loss = loss + settings.router_z_loss_weight * stats.router_z_loss.mean()
    return loss


def inputs_and_targets(tokens_BT1: Array) -> tuple[Array, Array]:
    """The tokens [B, T] and those after them, with their positions split over the mesh."""
    return as_batch(tokens_BT1[:, :-1]), as_batch(tokens_BT1[:, 1:])


def choose_mesh(config: TrainConfig) -> Mesh:
    """The mesh of the settings; by default as many devices on the data axis as divide the batch.

    With several processes it is of all their devices, on the data axis by default.
    """
    if config.mesh is not None:
        return device_mesh(read_mesh(config.mesh))
    if jax.process_count() > 1:
        return data_mesh(config.num_devices or jax.device_count())
    return data_mesh(config.num_devices or fitting_devices(config.batch_size, jax.device_count()))


class JaxLearner:
    """Trains a `Model` with optax."""

    compiles = True

    def __init__(self, config: TrainConfig, model: Model):
        self.config, self.model, self.precision = config, model, PRECISIONS[config.precision]
        self.mesh = choose_mesh(config)
        with self._on_mesh():
            exchange_in_use(model.moe)  # ValueError if the exchange cannot run the model
        check_batch(self.mesh, config.batch_size)
        self.processes = Processes(jax.process_count(), jax.process_index())
        self.rows = rows_here(self.mesh, config.batch_size) if self.processes.count > 1 else None
        self.key = jax.random.key(config.seed)
        whole = replicated(self.mesh)
        self.graphdef, params, rest = model.start(jax.random.fold_in(self.key, INIT), self.mesh)
        if config.optimizer.bias_update_rate:  # a correction bias that was stored in bf16 would not move
            rest = jax.tree.map(lambda bias: bias.astype(jnp.float32), rest)
        self.rest = jax.device_put(rest, whole)  # what no gradient trains
        arrays = declared(self.module(params))
        check_divides(self.mesh, arrays)
        self.numbers = sum(numbers_on_device(self.mesh, arrays).values())
        self.optimizer = make_optimizer(config.optimizer, config.steps, arrays)
        parts = split_tree(self.mesh, jax.eval_shape(self.optimizer.init, params), arrays)
        self.state: State = {"params": params, "optimizer": jax.jit(self.optimizer.init, out_shardings=parts)(params)}
        self.num_parameters = sum(x.size for x in jax.tree.leaves(self.state["params"]))
        self.device = f"{self.mesh.size} of {jax.device_count()} {jax.default_backend()} devices"
        if self.processes.count > 1:
            self.device += f" in {self.processes.count} processes"
        placed = jax.tree.map(lambda x: x.sharding, self.state)
        self._step = jax.jit(self._update, donate_argnums=0, out_shardings=(placed, whole, whole))
        self._evaluate = jax.jit(self._add_batch, donate_argnums=1, out_shardings=whole)

    def module(self, params: State | None = None, rest: Any = None) -> Any:
        """The model as a module, with the current weights or the given ones."""
        params, rest = self.state["params"] if params is None else params, self.rest if rest is None else rest
        return nnx.merge(self.graphdef, params, rest)

    def _run(self, params: State, rest: Any, tokens_BT: Array, **kwargs: Any) -> ModelOutput:
        """What the model computes, in the precision of the settings."""
        module = cast_to_compute(self.module(params, rest), self.precision)
        output = alone_together(module).run(tokens_BT, **kwargs)
        return output._replace(logits_BTV=output.logits_BTV.astype(self.precision.output))

    def _update(self, state: State, rest: Any, tokens_BT1: Array, step: Array) -> tuple[State, Any, Array]:
        key = jax.random.fold_in(jax.random.fold_in(self.key, STEP), step)

        def losses(params: State) -> tuple[Array, tuple[Array, ModelOutput]]:
            tokens_BT, next_BT = inputs_and_targets(tokens_BT1)
            output = self._run(params, rest, tokens_BT, key=key, training=True, remat=self.config.remat)
            loss = next_token_loss(output.logits_BTV, next_BT)
            return objective(loss, output.stats, self.model, self.config.optimizer), (loss, output)

        (_, (loss, output)), gradient = jax.value_and_grad(losses, has_aux=True)(state["params"])
        update, moments = self.optimizer.update(
            gradient, state["optimizer"], state["params"], chosen=chosen_experts(output.stats)
        )
        params = optax.apply_updates(state["params"], update)
        return {"params": params, "optimizer": moments}, self._rebalanced(params, rest, output.expert_LBTK), loss

    def _rebalanced(self, params: State, rest: Any, expert_LBTK: Array) -> Any:
        """`rest` with the correction biases moved by the load of the step's tokens, on all devices."""
        rate, num_experts = self.config.optimizer.bias_update_rate, self.model.moe.num_experts
        if not rate:
            return rest
        module = self.module(params, rest)
        tokens_LE = jax.vmap(lambda expert_BTK: tokens_per_expert(expert_BTK, num_experts))(expert_LBTK)
        module.update_correction_biases(tokens_LE, rate, self.config.optimizer.recentre_bias)
        return nnx.split(module, nnx.Param, ...)[2]

    def _add_batch(
        self, params: State, total: State, rest: Any, tokens_BT1: Array, key: Array, number: Array
    ) -> State:
        noise_key = jax.random.fold_in(key, number) if self.config.eval_noise else None
        tokens_BT, next_BT = inputs_and_targets(tokens_BT1)
        output = self._run(params, rest, tokens_BT, key=noise_key, training=False)
        loss = next_token_loss(output.logits_BTV, next_BT)
        return jax.tree.map(jnp.add, total, {"loss": loss, "stats": output.stats})

    def _on_mesh(self) -> contextlib.ExitStack:
        """The context of the run's programs: its mesh, how tokens get to their experts, and how they attend."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(exchange(self.config.exchange))
        stack.enter_context(attention_by(self.config.attention))
        return stack

    def _put(self, tokens_BT1: np.ndarray) -> Array:
        """A batch, of which this process may hold its share only, on the devices of the mesh."""
        if self.rows is None:
            return put_batch(tokens_BT1, self.mesh)
        return put_share(tokens_BT1, self.mesh, self.config.batch_size)

    def train_step(self, step: int, tokens_BT1: np.ndarray) -> Array:
        tokens = self._put(tokens_BT1)
        with self._on_mesh():
            self.state, self.rest, loss = self._step(self.state, self.rest, tokens, put_number(step, self.mesh))
        return loss

    def evaluate(self, step: int, use: str, batches: Iterable[np.ndarray]) -> Evaluation:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(self.key, EVALUATE), step), _USES[use])
        sizes = {"L": self.model.num_mixtures, "E": self.model.moe.num_experts}
        shapes = {name: tuple(sizes[dim] for dim in "L" + role_and_dims(name)[1]) for name in MoEStats._fields}
        zeros = {"loss": jnp.zeros(()), "stats": MoEStats(**{name: jnp.zeros(shape) for name, shape in shapes.items()})}
        total = jax.device_put(zeros, replicated(self.mesh))
        number = -1
        for number, tokens_BT1 in enumerate(batches):
            tokens = self._put(tokens_BT1)
            with self._on_mesh():
                i = put_number(number, self.mesh)
                total = self._evaluate(self.state["params"], total, self.rest, tokens, key, i)
        mean = jax.tree.map(lambda x: np.asarray(x) / max(number + 1, 1), total)
        return Evaluation(
            loss=float(mean["loss"]),
            dropped_fraction_L=mean["stats"].dropped_fraction.tolist(),
            expert_load_LE=mean["stats"].expert_load_E.tolist(),
            router_entropy_L=mean["stats"].router_entropy.tolist(),
            load_balance_loss_L=mean["stats"].load_balance_loss.tolist(),
        )

    def save(self, folder: Path, step: int, settings: dict[str, Any], keep: Keep = KEEP) -> Saving:
        return checkpoint.begin(folder, step, self._stored(), settings, self.processes, keep)

    def restore(self, folder: Path) -> tuple[int, dict[str, Any]]:
        step, settings, stored = checkpoint.restore(folder, self._stored(), self.state, self.processes)
        module = self.module()
        state = stored_state(module)
        nnx.replace_by_pure_dict(state, stored["params"])
        nnx.update(module, state)
        _, params, rest = nnx.split(module, nnx.Param, ...)
        self.rest = jax.device_put(rest, replicated(self.mesh))
        self.state = {"params": nnx.to_pure_dict(params), "optimizer": stored["optimizer"]}
        return step, settings

    def _stored(self) -> State:
        """The content of a checkpoint: all stored variables of the model, trained or not, and the optimizer's state."""
        return {**self.state, "params": nnx.to_pure_dict(stored_state(self.module()))}

    def memory(self) -> Memory | None:
        if self.mesh.size == 1:
            return None
        held = map(int, self.processes.gather(str(bytes_held((self.state, self.rest)))))
        return Memory(STATE_BYTES * self.numbers, GRADIENT_BYTES * self.numbers, max(held))

    def sample(self, prompt: list[int], length: int, temperature: float) -> list[int]:
        """On the mesh, where the weights lie, if the model may be larger than a device; else on the first device."""
        key, given = jax.random.fold_in(self.key, SAMPLE), np.asarray([prompt], np.int32)
        if self.model.fits_alone:
            gathered = self._gathered((self.state["params"], self.rest))
            if not self.processes.first:
                return prompt
            module = self.module(*jax.device_put(gathered, jax.local_devices()[0]))
            tokens_BT = jax_moe.generate(module, given, max_new_tokens=length, temperature=temperature, key=key)
        else:
            with self._on_mesh():
                tokens_BT = jax_moe.generate(
                    self.module(), given, max_new_tokens=length, temperature=temperature, key=key
                )
                tokens_BT = jax.jit(lambda x: x, out_shardings=replicated(self.mesh))(tokens_BT)
        return np.asarray(tokens_BT)[0].tolist()

    def weights(self) -> dict[str, np.ndarray]:
        return jax_moe.to_torch(self.module())

    def write(self, folder: Path) -> None:
        if self.processes.count == 1:
            self.model.write(self.module(), folder)
            return
        self.processes.alone(lambda: write_newest(folder))

    def _gathered(self, tree: Any) -> Any:
        """The tree, with several processes as whole arrays in the memory of each of them, one array after another."""
        if self.processes.count == 1:
            return tree
        return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
