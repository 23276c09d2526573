"""optax set up to match torch.optim: where the defaults of the two differ, and how each difference is closed.

Each of these has a test:
1. AdamW's weight decay is 1e-2 in torch and 1e-4 in optax.
2. `clip_grad_norm_` divides by the norm plus 1e-6, `optax.clip_by_global_norm` by the norm: `clip_as_torch`.
3. optax computes schedules in float32 even where everything else is float64: `in_full_precision`.
4. torch does not touch a parameter without a gradient, nor its step count. In JAX the gradient is zero, and decay and
   momentum move the parameter. Experts without tokens are such parameters where each expert is its own module:
   `unchosen="skip"` does not move them (`jax_moe/unchosen.py`).
5. torch corrects Adam's bias in Python's float64, optax in float32. With float32 weights updates differ by up to 1e-5
   relative until 0.999^t is small, which is most of the drift of a float32 run. `unchosen="decay"`, optax's own AdamW,
   keeps this difference.
6. `optax.MultiSteps` accumulates gradients in float32 unless it is given another `accumulator_dtype`.

The rest is the same in both: eps outside the square root, decay times the learning rate, the schedule read at the
number of completed steps (0 for the first step), the form of Nesterov momentum. In torch, SGD's weight decay is part of
the gradient: chain `optax.add_decayed_weights` before `optax.sgd`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jax_moe.config.checks import require
from jax_moe.unchosen import Said, only_chosen, scale_by_skipping_adam

CLIP_EPS = 1e-6  # that of torch.nn.utils.clip_grad_norm_
WEIGHT_DECAY = 1e-2  # torch.optim.AdamW's default
Unchosen = Literal["skip", "decay"]


def clip_as_torch(max_norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_: every gradient times min(1, max_norm / (norm + 1e-6))."""

    def update(updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None) -> tuple:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + CLIP_EPS))
        return jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


def in_full_precision(schedule: optax.Schedule) -> Callable[[jax.Array | int], jax.Array]:
    """The schedule, called with a count in jax's widest float, so that it is computed in that dtype."""
    return lambda count: schedule(jnp.asarray(count, jnp.result_type(float)))


def warmup_schedule(peak: float, steps: int, *, warmup_steps: int = 0, final: float | None = None) -> optax.Schedule:
    """Learning rate by step, from 0: linear warm-up to `peak`, then constant or a cosine to `final` at `steps`."""
    if final is None:
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup_steps), alpha=final / peak)
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def adamw_as_torch(
    learning_rate: float | optax.Schedule, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = WEIGHT_DECAY, max_norm: float | None = None, mask: Any = None, unchosen: Unchosen = "decay",
    declared: Said = None,
) -> optax.GradientTransformationExtraArgs:
    """torch.optim.AdamW with torch's defaults, after `clip_grad_norm_` if `max_norm` is given.

    `mask`, as in `optax.adamw`, says what decays, like torch's groups with and without decay. `unchosen` says what
    happens to an expert in a step in which no token went to it. "decay": its gradient is zero, and decay and momentum
    go on, as for any stacked array. "skip": nothing, as in PyTorch if each expert is its own module, and every
    expert has a step count. Then call `update(gradients, state, params, chosen=chosen_experts(stats))`, and to
    accumulate gradients over calls use `jax_moe.unchosen.accumulated` in place of `optax.MultiSteps`. The variables
    say which weights belong to experts; if params are plain arrays, give `declared`: the module, or
    `jax_moe.declared(module)`. Raises ValueError for another `unchosen`; with "skip" `init` raises it for plain arrays
    without `declared`, and `update` without `chosen`.
    """
    require(unchosen in ("skip", "decay"), "unchosen", unchosen, "skip or decay")
    rate = in_full_precision(learning_rate) if callable(learning_rate) else learning_rate
    if unchosen == "skip":
        decayed = optax.add_decayed_weights(weight_decay, mask)
        scaled = scale_by_skipping_adam(*betas, eps, declared)
        adamw = optax.chain(scaled, decayed, only_chosen(declared), optax.scale_by_learning_rate(rate))
    else:
        adamw = optax.adamw(rate, b1=betas[0], b2=betas[1], eps=eps, weight_decay=weight_decay, mask=mask)
    chained = adamw if max_norm is None else optax.chain(clip_as_torch(max_norm), adamw)
    return optax.with_extra_args_support(chained)
