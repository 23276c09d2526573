"""`jax-moe train`: the training command, from an installed package."""

import sys
from typing import NoReturn


def train(words: list[str]) -> NoReturn:
    """Trains as the words say, and ends the process."""
    from moe_train import INSTALLED
    from moe_train.main import command

    sys.argv = [INSTALLED, *words]
    command()
