"""What a run's settings ask for: which model, on which text, and what a user should know of the two."""

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_moe.config import MakeMoEConfig, require
from train import data
from train.configs import PRESETS
from train.configs.settings import ModelSettings, TrainConfig, model_config
from train.learner import Learner
from train.tokens import Tokens, load_tokens

if TYPE_CHECKING:
    from train.models import Pretrained


@dataclass(frozen=True)
class Task:
    """A model and its text, both checked; no weight is read yet."""

    model: "MakeMoEConfig | Pretrained"
    text: data.Text | Tokens
    about: dict[str, Any]  # what the run's config.json says of the model
    note: str | None = None


def read_task(config: TrainConfig) -> Task:
    """The task of checked settings. Raises ValueError with one line for whatever is wrong with it."""
    if config.pretrained is not None:
        return _finetune(config, Path(config.pretrained))
    require(config.preset != "finetune", "preset", config.preset, "used with --pretrained DIR")
    weight = config.optimizer.balance_loss_weight
    require(weight is not None, "balance_loss_weight", weight, "a number without --pretrained")
    if config.framework == "torch" and find_spec("torch") is None:
        raise ValueError("framework='torch': needs PyTorch; `pip install 'jax-moe[torch]'`")
    text = data.load_text(config.data, config.model.block_size)
    model = model_config(config, len(text.vocabulary))
    return Task(model, text, dataclasses.asdict(model))


def _finetune(config: TrainConfig, folder: Path) -> Task:
    from train.models import Pretrained

    usual = PRESETS[config.preset].model if config.preset else ModelSettings()
    for one in dataclasses.fields(ModelSettings):
        value = getattr(config.model, one.name)
        same = one.name == "block_size" or value == getattr(usual, one.name)
        require(same, one.name, value, "left out with --pretrained: the checkpoint says it")
    block_size = config.model.block_size
    require(block_size >= 1, "block_size", block_size, "an integer of at least 1")
    there = (folder / "config.json").is_file()
    require(there, "pretrained", str(folder), "a folder of `save_pretrained`, with its config.json")
    try:
        model = Pretrained(folder)
    except ValueError as error:
        raise ValueError(f"pretrained={str(folder)!r}: {' '.join(str(error).split())}") from None
    positions, note = model.config.max_positions, None
    if block_size > positions:
        note = f"note: block_size={block_size} is longer than the {positions} positions that the model was made for"
    text = load_tokens(config.data, folder, model.config.vocab_size, block_size)
    return Task(model, text, {"pretrained": str(folder.absolute()), "model_type": model.model_type}, note)


def make_learner(config: TrainConfig, task: Task) -> Learner:
    """The framework that the settings name, imported only now."""
    if config.framework == "torch":
        from train.torch_learner import TorchLearner

        assert isinstance(task.model, MakeMoEConfig)
        return TorchLearner(config, task.model)
    from train.jax_learner import JaxLearner
    from train.models import FreshMakeMoE

    return JaxLearner(config, FreshMakeMoE(task.model) if isinstance(task.model, MakeMoEConfig) else task.model)
