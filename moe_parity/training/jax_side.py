"""The JAX side of a compared training run: jitted steps; weights and optimizer state are donated."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_moe.dims import Array
from jax_moe.losses import chosen_experts, next_token_loss, pool_balance_loss, tokens_per_expert
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE, Randomness
from jax_moe.models.stack import ModelOutput
from jax_moe.optimizers import adamw_as_torch, warmup_schedule
from jax_moe.porting.state_dict import to_torch
from jax_moe.stored import stored_state
from jax_moe.unchosen import SkippingAdamState, flat_counts
from moe_parity.training.settings import Numbers, TrainSettings

Loss = Callable[[Any, dict[str, Array], TrainSettings], tuple[Array, tuple[Array, Array]]]


@dataclass(frozen=True)
class Curve:
    """The losses [S] of one side's steps, and the experts of every token [S, parts, L, tokens, K]."""

    loss_S: np.ndarray
    expert_SNLTK: np.ndarray


def schedule(settings: TrainSettings) -> optax.Schedule:
    """`settings.rate`, which PyTorch's side reads, as an optax schedule."""
    return warmup_schedule(
        settings.learning_rate, settings.steps, warmup_steps=settings.warmup_steps, final=settings.final_learning_rate
    )


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """AdamW with the update rule of torch."""
    return adamw_as_torch(
        schedule(settings), weight_decay=settings.weight_decay, max_norm=settings.clip_norm, unchosen=settings.unchosen
    )


def makemoe_loss(model: MakeMoE, part: dict[str, Array], settings: TrainSettings) -> tuple[Array, tuple[Array, Array]]:
    """The cross-entropy of the next token plus both router losses; experts [L, tokens, K], those with tokens [L, E]."""
    tokens = part["tokens"]
    draws = Randomness(**{name: value for name, value in part.items() if name != "tokens"})
    output = model.run(tokens[:, :-1], randomness=draws)
    loss = next_token_loss(output.logits_BTV, tokens[:, 1:])
    loss += settings.balance_loss_weight * pool_balance_loss(output.stats, model.config.moe)
    return loss + settings.router_z_loss_weight * output.stats.router_z_loss.mean(), choices(output)


def decoder_loss(model: Decoder, part: dict[str, Array], settings: TrainSettings) -> tuple[Array, tuple[Array, Array]]:
    """The cross-entropy of the next token plus the contract's balance loss; the experts as in `makemoe_loss`."""
    tokens, config = part["tokens"], model.config
    output = model.run(tokens)
    loss = next_token_loss(output.logits_BTV[:, :-1], tokens[:, 1:])
    loss += config.balance_loss_weight * pool_balance_loss(output.stats, config.moe)
    return loss, choices(output)


def choices(output: ModelOutput) -> tuple[Array, Array]:
    """The experts of every token [L, tokens, K], and which had any [L, E]."""
    L, _, _, K = output.expert_LBTK.shape
    return output.expert_LBTK.reshape(L, -1, K), chosen_experts(output.stats)


class JaxTrainer:
    """A model's weights and optimizer state, and the step that updates them."""

    def __init__(
        self, model: nnx.Module, settings: TrainSettings, loss: Loss,
        optimizer: optax.GradientTransformation | None = None, compiler_options: tuple[tuple[str, int], ...] = (),
    ):
        self.model, self.settings = model, settings
        self.optimizer = optimizer or make_optimizer(settings)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        self.rest: Any = rest
        self.params = jax.tree.map(jnp.copy, params)  # the step donates them
        self.state = jax.jit(self.optimizer.init)(self.params)
        self._gradients = gradients_of(graphdef, loss, settings, compiler_options)
        self._update = jax.jit(partial(_update, self.optimizer), donate_argnums=(0, 1))
        self._graphdef, self._move_biases = graphdef, jax.jit(partial(_moved_biases, graphdef, settings))

    def run(self, draw: Callable[[int], Numbers], steps: Iterable[int]) -> Curve:
        """Trains on the inputs that `draw` gives for these steps."""
        losses, chosen = [], []
        dtype = jax.tree.leaves(self.params)[0].dtype
        for step in steps:
            given = {name: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for name, v in draw(step).items()}
            gradients, loss, expert_NLTK, chosen_LE = self._gradients(self.params, self.rest, given)
            self.params, self.state = self._update(self.params, self.state, gradients, chosen_LE)
            if self.settings.bias_update_rate:
                self.rest = self._move_biases(self.params, self.rest, expert_NLTK)
            losses.append(float(loss))
            chosen.append(np.asarray(expert_NLTK))
        return Curve(np.asarray(losses), np.stack(chosen))

    def weights(self, layout: str | None = None) -> dict[str, np.ndarray]:
        """The present weights, correction biases too, under PyTorch's names."""
        model = nnx.merge(self._graphdef, self.params, self.rest)
        return to_torch(model, stored_state(model), layout=layout)


def expert_counts(state: optax.OptState) -> dict[str, np.ndarray]:
    """{path of experts: number of steps of each expert}, if the optimizer counts them separately."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, SkippingAdamState))
    counted = [flat_counts(node.expert_counts) for node in nodes if isinstance(node, SkippingAdamState)]
    return {path: np.asarray(value) for counts in counted for path, value in counts.items()}


@cache
def gradients_of(
    graphdef: Any, loss: Loss, settings: TrainSettings, compiler_options: tuple[tuple[str, int], ...]
) -> Callable:
    """(weights, other state, inputs of a step) -> mean gradient, mean loss, experts by part, experts with tokens."""

    def of_step(params: Any, rest: Any, given: dict[str, Array]) -> tuple[Any, Array, Array, Array]:
        def add_part(total: Any, part: dict[str, Array]) -> tuple[Any, tuple[Array, Array, Array]]:
            def of_part(params: Any) -> tuple[Array, tuple[Array, Array]]:
                return loss(nnx.merge(graphdef, params, rest), part, settings)

            (value, (expert_LTK, chosen_LE)), gradients = jax.value_and_grad(of_part, has_aux=True)(params)
            total = jax.tree.map(lambda a, b: a + b / settings.accumulation, total, gradients)
            return total, (value, expert_LTK, chosen_LE)

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradients, (loss_N, expert_NLTK, chosen_NLE) = jax.lax.scan(add_part, zeros, given)
        return gradients, loss_N.mean(), expert_NLTK, chosen_NLE.any(axis=0)

    return jax.jit(of_step, compiler_options=dict(compiler_options))


def _update(
    optimizer: optax.GradientTransformation, params: Any, state: optax.OptState, gradients: Any, chosen_LE: Array
) -> tuple[Any, Any]:
    """The new weights and optimizer state, in the buffers of the old."""
    updates, state = optax.with_extra_args_support(optimizer).update(gradients, state, params, chosen=chosen_LE)
    return optax.apply_updates(params, updates), state


def _moved_biases(graphdef: Any, settings: TrainSettings, params: Any, rest: Any, expert_NLTK: Array) -> Any:
    """The other state, with the correction biases moved by the load of a step's parts."""
    model = nnx.merge(graphdef, params, rest)
    num_experts = model.config.moe.num_experts
    tokens_LE = jax.vmap(lambda expert_NTK: tokens_per_expert(expert_NTK, num_experts), in_axes=1)(expert_NLTK)
    model.update_correction_biases(tokens_LE, settings.bias_update_rate)
    return nnx.split(model, nnx.Param, ...)[2]
