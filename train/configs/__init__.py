"""Settings of a run, and named sets of them."""

from train.configs import finetune, published, quick
from train.configs.settings import TrainConfig

PRESETS: dict[str, TrainConfig] = {"quick": quick.CONFIG, "published": published.CONFIG, "finetune": finetune.CONFIG}
