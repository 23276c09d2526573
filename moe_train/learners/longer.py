"""The learning rate of a run that is resumed with more steps than before."""

from moe_train.configs.settings import TrainConfig
from moe_train.learners.optimizer import learning_rate


def lengthened(config: TrainConfig, saved: TrainConfig, step: int) -> str | None:
    """A line on how the longer schedule changes the learning rate at this step; None if the run is not longer."""
    if config.steps <= saved.steps:
        return None
    before, now = (float(learning_rate(settings.optimizer, settings.steps)(step)) for settings in (saved, config))
    if before == now:
        rate = f"stays {now:.3g}"
    else:
        schedule = f"the {config.optimizer.decay} of {config.steps} steps"
        rate = f"follows {schedule}: {now:.3g} at step {step}, not {before:.3g}"
    return f"{config.steps} steps in place of {saved.steps}; the learning rate {rate}"
