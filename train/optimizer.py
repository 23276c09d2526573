"""AdamW and its learning rate, in optax; the torch side reads the same schedule."""

import optax

from train.configs.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0: linear warm-up from 0, then constant or cosine until the last step."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup, alpha=settings.final_learning_rate / peak)
    else:
        after = optax.constant_schedule(peak)
    return after if warmup == 0 else optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """AdamW as torch.optim.AdamW does it (decay on all parameters, times the learning rate), after optional clipping."""
    adamw = optax.adamw(
        learning_rate(settings, steps), b1=settings.beta1, b2=settings.beta2, eps=settings.eps, weight_decay=settings.weight_decay
    )
    return adamw if settings.clip_norm is None else optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
