"""A resumed run that is to take more steps than it set out for: what becomes of its learning rate."""

from train.configs.settings import TrainConfig
from train.learners.optimizer import learning_rate


def lengthened(config: TrainConfig, saved: TrainConfig, step: int) -> str | None:
    """In one line, what the longer schedule does at the step where the run goes on; None where it is no longer."""
    if config.steps <= saved.steps:
        return None
    before, now = (float(learning_rate(one.optimizer, one.steps)(step)) for one in (saved, config))
    if before == now:
        rate = f"stays {now:.3g}"
    else:
        rate = f"follows the {config.optimizer.decay} of {config.steps} steps: {now:.3g} at step {step}, not {before:.3g}"
    return f"{config.steps} steps in place of {saved.steps}; the learning rate {rate}"
