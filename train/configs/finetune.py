"""Where fine-tuning a pretrained model starts from: small steps, warmed up and decaying to nothing."""

from train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig

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
