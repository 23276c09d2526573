"""AdamW and its learning rate, in optax; the torch side reads the same schedule."""

from collections.abc import Mapping

import optax

from jax_moe.config.parameters import Declared
from jax_moe.optimizers import adamw_as_torch
from train.configs.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0: linear warm-up from 0, then constant or cosine until the last step."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup, alpha=settings.final_learning_rate / peak)
    else:
        after = optax.constant_schedule(peak)
    return after if warmup == 0 else optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    settings: OptimizerSettings, steps: int, declared: Mapping[str, Declared]
) -> optax.GradientTransformationExtraArgs:
    """AdamW and clipping as torch has them (decay on all parameters, times the learning rate); `chosen` goes into its update."""
    return adamw_as_torch(
        learning_rate(settings, steps), betas=(settings.beta1, settings.beta2), eps=settings.eps,
        weight_decay=settings.weight_decay, max_norm=settings.clip_norm, unchosen=settings.unchosen, declared=declared,
    )
