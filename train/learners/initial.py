"""`--init-from`: the weights of another makeMoE model, of the same sizes, for a run that begins with them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_moe.config.models import MakeMoEConfig
from jax_moe.porting.checkpoint import load
from jax_moe.porting.families.choices import Choices
from train.configs.adapt import Free, changed
from train.configs.settings import TrainConfig

# Of the model: what decides the shapes of its weights, and what else a folder says of it.
SIZES = ("block_size", "model_dim", "num_heads", "num_layers", "num_experts", "noise")
CONTRACT = (*SIZES, "top_k", "capacity_factor")


@dataclass(frozen=True)
class Initial:
    """A makeMoE model that was read."""

    path: str
    module: Any  # jax_moe.MakeMoE
    characters: str | None

    @property
    def config(self) -> MakeMoEConfig:
        """Its contract; of a file, sizes alone are known."""
        return self.module.config

    def fit(self, config: TrainConfig, free: Free) -> TrainConfig:
        """The settings with the model's in place of defaults."""
        known = CONTRACT if Path(self.path).is_dir() else SIZES
        return changed(config, free, **{name: getattr(self.config, name) for name in known})

    def check_sizes(self, config: TrainConfig, vocab_size: int) -> None:
        """Raises ValueError, naming them, for sizes that differ from the run's."""
        here = {"vocab_size": vocab_size, **{name: getattr(config.model, name) for name in SIZES}}
        differ = [name for name, value in here.items() if getattr(self.config, name) != value]
        if differ:
            said = ", ".join(f"{name}={getattr(self.config, name)} there and {here[name]} here" for name in differ)
            of = " (the vocabulary here is the text's)" if "vocab_size" in differ else ""
            raise ValueError(f"init_from={self.path!r}: must be a model of this run's sizes; {said}{of}")

    def note(self) -> str:
        """What a user should know."""
        begin = f"weights from {self.path}; the optimizer and the learning rate start anew"
        if self.characters is not None or Path(self.path).is_dir():
            return begin
        return f"{begin}\nnote: {self.path} does not say its characters; they are taken to be the sorted ones of this text"


def read_initial(path: str) -> Initial:
    """Raises ValueError with one line for what is no makeMoE model."""
    place = Path(path)
    if not place.exists():
        raise ValueError(f"init_from={path!r}: must be a run, a folder, or a .pt or .safetensors file; it does not exist")
    choices = None if place.is_dir() else Choices(top_k=1)  # a file does not say: the run's own settings decide
    try:
        checkpoint = load(place, choices)
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split()).removeprefix(f"{place}: ")
        said = "must be a makeMoE language model" if said.startswith("top_k: must be a setting of") else said
        raise ValueError(f"init_from={path!r}: {said}") from None
    if not checkpoint.of_characters:
        hint = "; --pretrained fine-tunes it" if checkpoint.family == "decoder" else ""
        raise ValueError(f"init_from={path!r}: must be a makeMoE language model, is {checkpoint.name}{hint}")
    return Initial(path, checkpoint.module, checkpoint.characters)
