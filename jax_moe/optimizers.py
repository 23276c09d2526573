"""optax set up as torch.optim is: where the two differ by default, and what is done about it.

Named here, and each tested: (1) AdamW's weight decay is 1e-2 in torch and 1e-4 in optax. (2) `clip_grad_norm_` divides by the
norm plus 1e-6, `optax.clip_by_global_norm` by the norm: `clip_as_torch`. (3) optax computes schedules in float32 even where
all else is float64: `in_full_precision`. (4) A parameter without a gradient is left alone by torch, its step count too; in JAX
its gradient is zero, and decay and momentum move it. Experts without tokens are such parameters where each is a module of its
own: `unchosen="skip"` leaves them alone (`jax_moe/unchosen.py`). (5) torch corrects Adam's bias in Python's float64, optax in
float32: in float32 updates differ by up to 1e-5 of themselves until 0.999^t is small, which is most of the drift of a float32
run; left as it is with `unchosen="decay"`, which is optax's own AdamW. (6) `optax.MultiSteps` adds gradients up in float32
unless it is told another `accumulator_dtype`. The rest is the same in both: eps outside the root, decay times the learning
rate, the schedule read at the number of steps before (the first at 0), Nesterov's form.
SGD's weight decay is part of the gradient in torch: chain `optax.add_decayed_weights` before `optax.sgd`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jax_moe.config.checks import require
from jax_moe.unchosen import only_chosen, scale_by_skipping_adam

CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_
WEIGHT_DECAY = 1e-2  # torch.optim.AdamW's default
Unchosen = Literal["skip", "decay"]


def clip_as_torch(max_norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_: every gradient times min(1, max_norm / (norm + 1e-6))."""

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None) -> tuple:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + CLIP_EPS))
        return jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


def in_full_precision(schedule: optax.Schedule) -> Callable[[jax.Array | int], jax.Array]:
    """The schedule at a count that is a float of jax's widest dtype, so that it is computed in that."""
    return lambda count: schedule(jnp.asarray(count, jnp.result_type(float)))


def adamw_as_torch(
    learning_rate: float | optax.Schedule, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = WEIGHT_DECAY, max_norm: float | None = None, mask: Any = None, unchosen: Unchosen = "decay",
) -> optax.GradientTransformationExtraArgs:
    """torch.optim.AdamW under its own defaults, after `clip_grad_norm_` where there is a `max_norm`.

    `mask`, as in `optax.adamw`, says what decays: torch's groups with and without decay. `unchosen`: what becomes of an expert
    in a step in which no token went to it. "decay": what a stacked array does by itself, its gradient is zero, and decay and
    momentum go on. "skip": what PyTorch does where each expert is a module of its own, nothing, and a count of steps for every
    expert; `update(gradients, state, params, chosen=chosen_experts(stats))` is then told which had tokens. Gradients
    accumulated over calls need `jax_moe.unchosen.accumulated` in place of `optax.MultiSteps`.
    """
    require(unchosen in ("skip", "decay"), "unchosen", unchosen, "skip or decay")
    rate = in_full_precision(learning_rate) if callable(learning_rate) else learning_rate
    if unchosen == "skip":
        decayed = optax.add_decayed_weights(weight_decay, mask)
        scaled = scale_by_skipping_adam(*betas, eps)
        adamw = optax.chain(scaled, decayed, only_chosen(), optax.scale_by_learning_rate(rate))
    else:
        adamw = optax.adamw(rate, b1=betas[0], b2=betas[1], eps=eps, weight_decay=weight_decay, mask=mask)
    chained = adamw if max_norm is None else optax.chain(clip_as_torch(max_norm), adamw)
    return optax.with_extra_args_support(chained)
