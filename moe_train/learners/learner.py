"""The interface between a run and a framework."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_train.run.keep import Keep
from moe_train.run.metrics import Evaluation
from moe_train.run.saving import Saving


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: weights and optimizer state by the rules of the mesh, gradients, and the state measured."""

    state: int
    gradients: int
    held: int


class Learner(Protocol):
    """A model with its optimizer. Draws are functions of (seed, step): the weights and moments are the whole state."""

    num_parameters: int
    device: str  # in words
    compiles: bool  # whether the first step and evaluation take longer
    rows: np.ndarray | None  # the sequences of a batch that this process reads, None: all

    def train_step(self, step: int, tokens_BT1: np.ndarray) -> Any:
        """Takes a step; its loss, for which `float` waits."""

    def evaluate(self, step: int, use: str, batches: Iterable[np.ndarray]) -> Evaluation:
        """Means over the batches, without dropout."""

    def save(self, folder: Path, step: int, settings: dict[str, Any], keep: Keep) -> Saving | None:
        """Begins to write a checkpoint, whole or not at all; None if it is written. The next step may be taken."""

    def restore(self, folder: Path) -> tuple[int, dict[str, Any]]:
        """Loads the newest checkpoint; (step, settings). Raises ValueError if there is none, or it cannot be read."""

    def memory(self) -> Memory | None:
        """What each device of a mesh holds between steps, the most of them; None for one device."""

    def sample(self, prompt: list[int], length: int, temperature: float) -> list[int]:
        """The prompt and `length` new tokens."""

    def write(self, folder: Path) -> None:
        """Writes the model into the run's folder: makeMoE's model.safetensors, or a folder of `save_pretrained`.

        The newest checkpoint is of this step.
        """
