"""What the run asks of a framework, and the numbers an evaluation gives."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.run.metrics import Evaluation


class Learner(Protocol):
    """A model with its optimizer. Every draw is a function of (seed, step), so a learner is its weights and moments."""

    num_parameters: int
    device: str  # in words
    compiles: bool  # whether the first step and evaluation take longer, with nothing to see

    def train_step(self, step: int, tokens_BT1: np.ndarray) -> Any:
        """One update; a handle of its loss that `float` waits for."""

    def evaluate(self, step: int, use: str, batches: Iterable[np.ndarray]) -> Evaluation:
        """The mean over batches, without dropout."""

    def save(self, folder: Path, step: int, settings: dict[str, Any]) -> None:
        """Writes a checkpoint that appears whole or not at all."""

    def restore(self, folder: Path) -> tuple[int, dict[str, Any]]:
        """Loads the newest checkpoint; its step and settings. Raises ValueError if there is none or it cannot be read."""

    def sample(self, prompt: list[int], length: int, temperature: float) -> list[int]:
        """The prompt and `length` new tokens."""

    def write(self, folder: Path) -> None:
        """Puts the trained model into the run's folder: makeMoE's model.safetensors, or a folder of `save_pretrained`."""
