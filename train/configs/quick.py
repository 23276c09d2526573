"""What `make train` runs: a smaller model that writes English-like words after a few minutes on two cores."""

from train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig

CONFIG = TrainConfig(
    steps=1200,
    eval_every=100,
    eval_batches=5,
    checkpoint_every=400,
    model=ModelSettings(block_size=64, model_dim=96, num_heads=6, num_layers=4),
    optimizer=OptimizerSettings(learning_rate=3e-3, clip_norm=1.0, warmup_steps=50, decay="cosine", final_learning_rate=3e-4),
)
