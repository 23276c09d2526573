"""Settings of a run, and named sets of them."""

from moe_train.configs import finetune, published, quick
from moe_train.configs.settings import TrainConfig

PRESETS: dict[str, TrainConfig] = {"quick": quick.CONFIG, "published": published.CONFIG, "finetune": finetune.CONFIG}
