"""AdamW and its learning rate, in optax; the torch side reads the same schedule."""

from collections.abc import Mapping

import optax

from jax_moe.config.parameters import Declared
from jax_moe.optimizers import adamw_as_torch, warmup_schedule
from moe_train.configs.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0: `warmup_schedule` under the run's settings."""
    final = settings.final_learning_rate if settings.decay == "cosine" else None
    return warmup_schedule(settings.learning_rate, steps, warmup_steps=settings.warmup_steps, final=final)


def make_optimizer(
    settings: OptimizerSettings, steps: int, declared: Mapping[str, Declared]
) -> optax.GradientTransformationExtraArgs:
    """AdamW and clipping as in torch: all parameters decay, times the learning rate. Its update takes `chosen`."""
    return adamw_as_torch(
        learning_rate(settings, steps), betas=(settings.beta1, settings.beta2), eps=settings.eps,
        weight_decay=settings.weight_decay, max_norm=settings.clip_norm, unchosen=settings.unchosen, declared=declared,
    )
