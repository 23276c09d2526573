"""The JAX side of a compared training run: jitted functions over nested arrays, weights and optimizer state donated."""

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
from jax_moe.losses import chosen_experts, pool_balance_loss
from jax_moe.models.block import Randomness
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.models.stack import ModelOutput
from jax_moe.optimizers import adamw_as_torch
from jax_moe.porting.state_dict import to_torch
from jax_moe.unchosen import SkippingAdamState, flat_counts
from moe_parity.training.settings import Numbers, TrainSettings

Loss = Callable[[Any, dict[str, Array], TrainSettings], tuple[Array, tuple[Array, Array]]]


@dataclass(frozen=True)
class Curve:
    """What one side reports of some steps: the loss (S) and the experts of every token [S, parts, L, tokens, K]."""

    loss_S: np.ndarray
    expert_SNLTK: np.ndarray


def schedule(settings: TrainSettings) -> optax.Schedule:
    """`settings.rate` in optax's words."""
    warmup, peak = settings.warmup_steps, settings.learning_rate
    decay = optax.cosine_decay_schedule(peak, max(1, settings.steps - warmup), alpha=settings.final_learning_rate / peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """AdamW as torch has it."""
    return adamw_as_torch(
        schedule(settings), weight_decay=settings.weight_decay, max_norm=settings.clip_norm, unchosen=settings.unchosen
    )


def makemoe_loss(model: MakeMoE, part: dict[str, Array], settings: TrainSettings) -> tuple[Array, tuple[Array, Array]]:
    """Cross-entropy of the next token with both router losses; the experts [L, tokens, K], and which had tokens [L, E]."""
    tokens = part["tokens"]
    draws = Randomness(**{name: value for name, value in part.items() if name != "tokens"})
    output = model.run(tokens[:, :-1], randomness=draws)
    loss = optax.softmax_cross_entropy_with_integer_labels(output.logits_BTV, tokens[:, 1:]).mean()
    loss += settings.balance_loss_weight * pool_balance_loss(output.stats, model.config.moe)
    return loss + settings.router_z_loss_weight * output.stats.router_z_loss.mean(), choices(output)


def decoder_loss(model: Decoder, part: dict[str, Array], settings: TrainSettings) -> tuple[Array, tuple[Array, Array]]:
    """Cross-entropy of the next token plus the contract's balance loss; the experts [L, tokens, K], those with tokens [L, E]."""
    tokens, config = part["tokens"], model.config
    output = model.run(tokens)
    loss = optax.softmax_cross_entropy_with_integer_labels(output.logits_BTV[:, :-1], tokens[:, 1:]).mean()
    loss += config.balance_loss_weight * pool_balance_loss(output.stats, config.moe)
    return loss, choices(output)


def choices(output: ModelOutput) -> tuple[Array, Array]:
    """The experts of every token [L, tokens, K], and which had any [L, E]."""
    L, _, _, K = output.expert_LBTK.shape
    return output.expert_LBTK.reshape(L, -1, K), chosen_experts(output.stats)


class JaxTrainer:
    """A model's weights and optimizer state, and the step that replaces them."""

    def __init__(
        self, model: nnx.Module, settings: TrainSettings, loss: Loss, optimizer: optax.GradientTransformation | None = None,
        compiler_options: tuple[tuple[str, int], ...] = (),
    ):
        self.model = model
        self.optimizer = optimizer or make_optimizer(settings)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        self.rest: Any = rest
        self.params = jax.tree.map(jnp.copy, params)  # the step takes them for itself
        self.state = jax.jit(self.optimizer.init)(self.params)
        self._gradients = gradients_of(graphdef, loss, settings, compiler_options)
        self._update = jax.jit(partial(_update, self.optimizer), donate_argnums=(0, 1))

    def run(self, draw: Callable[[int], Numbers], steps: Iterable[int]) -> Curve:
        """Trains on the numbers of these steps."""
        losses, chosen = [], []
        dtype = jax.tree.leaves(self.params)[0].dtype
        for step in steps:
            given = {name: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for name, v in draw(step).items()}
            gradients, loss, expert_NLTK, chosen_LE = self._gradients(self.params, self.rest, given)
            self.params, self.state = self._update(self.params, self.state, gradients, chosen_LE)
            losses.append(float(loss))
            chosen.append(np.asarray(expert_NLTK))
        return Curve(np.asarray(losses), np.stack(chosen))

    def weights(self, layout: str | None = None) -> dict[str, np.ndarray]:
        """The parameters as they are now, under their names."""
        return to_torch(self.model, self.params, layout=layout)


def expert_counts(state: optax.OptState) -> dict[str, np.ndarray]:
    """{path of the experts: steps of each}, where an optimizer counts them one by one."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, SkippingAdamState))
    counted = [flat_counts(node.expert_counts) for node in nodes if isinstance(node, SkippingAdamState)]
    return {path: np.asarray(value) for one in counted for path, value in one.items()}


@cache
def gradients_of(graphdef: Any, loss: Loss, settings: TrainSettings, compiler_options: tuple[tuple[str, int], ...]) -> Callable:
    """(weights, what is not trained, a step's numbers) -> gradient and loss, means over the parts, the experts, any part's."""

    def of_step(params: Any, rest: Any, given: dict[str, Array]) -> tuple[Any, Array, Array, Array]:
        def add_part(total: Any, part: dict[str, Array]) -> tuple[Any, tuple[Array, Array, Array]]:
            of_part = jax.value_and_grad(lambda params: loss(nnx.merge(graphdef, params, rest), part, settings), has_aux=True)
            (value, (expert_LTK, chosen_LE)), gradients = of_part(params)
            return jax.tree.map(lambda a, b: a + b / settings.accumulation, total, gradients), (value, expert_LTK, chosen_LE)

        gradients, (loss_N, expert_NLTK, chosen_NLE) = jax.lax.scan(add_part, jax.tree.map(jnp.zeros_like, params), given)
        return gradients, loss_N.mean(), expert_NLTK, chosen_NLE.any(axis=0)

    return jax.jit(of_step, compiler_options=dict(compiler_options))


def _update(
    optimizer: optax.GradientTransformation, params: Any, state: optax.OptState, gradients: Any, chosen_LE: Array
) -> tuple[Any, Any]:
    """New weights and state in the memory of the old."""
    updates, state = optax.with_extra_args_support(optimizer).update(gradients, state, params, chosen=chosen_LE)
    return optax.apply_updates(params, updates), state
