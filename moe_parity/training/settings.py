"""The inputs that both sides of a compared training run share: settings, batches, noise and dropout masks in numpy."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_moe.config.checks import require
from jax_moe.config.models import MakeMoEConfig
from jax_moe.optimizers import Unchosen

Numbers = dict[str, np.ndarray]
SUCCESSORS = 3  # possible next tokens of each token: few, so that a model can learn them


@dataclass(frozen=True)
class TrainSettings:
    """AdamW with clipping, linear warm-up from 0, cosine decay and accumulated gradients."""

    steps: int = 200
    batch_size: int = 2
    """Sequences in each of the parts over which a step accumulates its gradient."""
    accumulation: int = 2
    num_tokens: int = 16
    seed: int = 0
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    clip_norm: float = 1.0
    weight_decay: float = 0.01
    unchosen: Unchosen = "decay"
    """How an expert without tokens in a step is updated, as in `adamw_as_torch`."""
    balance_loss_weight: float = 0.01
    """For makeMoE; the contract of a Hugging Face model has its own weight."""
    router_z_loss_weight: float = 0.001
    bias_update_rate: float = 0.0
    """For a Hugging Face model with a correction bias: `update_correction_bias` after every step; 0 keeps it."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulation", 1), ("num_tokens", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")

    @property
    def warmup_steps(self) -> int:
        """A tenth of the steps."""
        return self.steps // 10

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = self.warmup_steps
        if step < warmup:
            return self.learning_rate * step / warmup
        share = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        final = self.final_learning_rate
        return final + (self.learning_rate - final) * 0.5 * (1 + math.cos(math.pi * share))


def texts(vocab_size: int, settings: TrainSettings, step: int, length: int) -> np.ndarray:
    """Tokens [accumulation, batch_size, length]: each is followed by one of its SUCCESSORS possible next tokens."""
    following = np.random.default_rng([settings.seed, 0]).integers(0, vocab_size, (vocab_size, SUCCESSORS))
    draw = np.random.default_rng([settings.seed, 1, step])
    tokens = np.empty((settings.accumulation, settings.batch_size, length), np.int32)
    tokens[..., 0] = draw.integers(0, vocab_size, tokens.shape[:2])
    for position in range(1, length):
        tokens[..., position] = following[tokens[..., position - 1], draw.integers(0, SUCCESSORS, tokens.shape[:2])]
    return tokens


def makemoe_numbers(config: MakeMoEConfig, settings: TrainSettings, step: int) -> Numbers:
    """A step's texts (one token longer than the input), router noise and dropout masks, stacked by part."""
    T = settings.num_tokens
    given = {"tokens": texts(config.vocab_size, settings, step, T + 1)}
    draw = np.random.default_rng([settings.seed, 2, step])
    N, B, L, D = settings.accumulation, settings.batch_size, config.num_layers, config.model_dim
    if config.noise:
        given["noise_BTE"] = draw.standard_normal((N, L, B, T, config.num_experts))
    if config.dropout > 0:
        for name, shape in (
            ("attention_keep_BHTU", (B, config.num_heads, T, T)), ("output_keep_BTD", (B, T, D)),
            ("keep_BTKD", (B, T, config.top_k, D)),
        ):
            given[name] = draw.random((N, L, *shape)) >= config.dropout
    return given


def decoder_numbers(config: Any, settings: TrainSettings, step: int) -> Numbers:
    """A step's texts; a Hugging Face model trains without noise or dropout."""
    return {"tokens": texts(config.vocab_size, settings, step, settings.num_tokens)}
