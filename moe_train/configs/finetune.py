"""Defaults for fine-tuning a pretrained model: a small learning rate with warm-up, which decays to 0."""

from moe_train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig

CONFIG = TrainConfig(
    preset="finetune",
    steps=200,
    batch_size=8,
    eval_every=50,
    eval_batches=5,
    checkpoint_every=100,
    sample_length=100,
    model=ModelSettings(block_size=256),
    optimizer=OptimizerSettings(
        learning_rate=2e-5, clip_norm=1.0, warmup_steps=10, decay="cosine", balance_loss_weight=None
    ),
)
