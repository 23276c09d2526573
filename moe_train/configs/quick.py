"""The run of `make train`: a smaller model that writes English-like words after about three minutes on two cores."""

from moe_train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig

# No dropout: the run sees less than half of its text. Without the balance loss half of the experts get no tokens.
CONFIG = TrainConfig(
    preset="quick",
    steps=4000,
    eval_every=200,
    eval_batches=10,
    checkpoint_every=2000,
    sample_temperature=0.6,
    model=ModelSettings(model_dim=96, num_heads=6, num_layers=4, dropout=0.0),
    optimizer=OptimizerSettings(
        learning_rate=3e-3, clip_norm=1.0, warmup_steps=100, decay="cosine", final_learning_rate=3e-4,
        balance_loss_weight=0.01,
    ),
)
