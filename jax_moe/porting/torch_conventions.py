"""optax set up as torch.optim is: where the two differ by default, and what is done about it.

Named here, and each tested: (1) AdamW's weight decay is 1e-2 in torch and 1e-4 in optax. (2) `clip_grad_norm_` divides by the
norm plus 1e-6, `optax.clip_by_global_norm` by the norm: `clip_as_torch`. (3) optax computes schedules in float32 even where
all else is float64: `in_full_precision`. (4) A parameter without a gradient is left alone by torch, its step count too; in JAX
its gradient is zero, and decay and momentum move it. `torch_ref` gives zeros; of other modules `optimizer_from_torch` names the
parameters whose counts differ. (5) torch corrects Adam's bias in Python's float64, optax in float32: in float32 updates
differ by up to 1e-5 of themselves until 0.999^t is small, which is most of the drift of a float32 run; left as it is. The rest
is the same in both: eps outside the root, decay times the learning rate, the schedule read at the number of steps before (the
first at 0), Nesterov's form.
SGD's weight decay is part of the gradient in torch: chain `optax.add_decayed_weights` before `optax.sgd`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_
WEIGHT_DECAY = 1e-2  # torch.optim.AdamW's default


def clip_as_torch(max_norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_: every gradient times min(1, max_norm / (norm + 1e-6))."""

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None) -> tuple:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + CLIP_EPS))
        return jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


def in_full_precision(schedule: optax.Schedule) -> Callable[[jax.Array], jax.Array]:
    """The schedule at a count that is a float of jax's widest dtype, so that it is computed in that."""
    return lambda count: schedule(jnp.asarray(count, jnp.result_type(float)))


def adamw_as_torch(
    learning_rate: float | optax.Schedule, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = WEIGHT_DECAY, max_norm: float | None = None,
) -> optax.GradientTransformation:
    """torch.optim.AdamW under its own defaults, after `clip_grad_norm_` where there is a `max_norm`."""
    rate = in_full_precision(learning_rate) if callable(learning_rate) else learning_rate
    adamw = optax.adamw(rate, b1=betas[0], b2=betas[1], eps=eps, weight_decay=weight_decay)
    return adamw if max_norm is None else optax.chain(clip_as_torch(max_norm), adamw)
