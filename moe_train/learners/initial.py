"""`--init-from`: the weights of another makeMoE model of the same sizes, from which a run starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_moe.config.choices import Choices
from jax_moe.config.models import MakeMoEConfig
from jax_moe.porting.checkpoint import load
from moe_train.configs.adapt import Free, changed
from moe_train.configs.settings import TrainConfig

# Model settings that decide the shapes of weights, and those that a folder records.
SIZES = ("block_size", "model_dim", "num_heads", "num_layers", "num_experts", "noise")
CONTRACT = (*SIZES, "top_k", "capacity_factor")


@dataclass(frozen=True)
class Initial:
    """A makeMoE model read from `path`; `characters` are its vocabulary, None if unknown."""

    path: str
    module: Any  # jax_moe.MakeMoE
    characters: str | None

    @property
    def config(self) -> MakeMoEConfig:
        """The model's contract. A file tells the sizes only."""
        return self.module.config

    def fit(self, config: TrainConfig, free: Free) -> TrainConfig:
        """The settings with the model's values in place of free defaults."""
        known = CONTRACT if Path(self.path).is_dir() else SIZES
        return changed(config, free, **{name: getattr(self.config, name) for name in known})

    def check_sizes(self, config: TrainConfig, vocab_size: int) -> None:
        """Raises ValueError, naming the sizes, if they differ from the run's."""
        here = {"vocab_size": vocab_size, **{name: getattr(config.model, name) for name in SIZES}}
        differ = [name for name, value in here.items() if getattr(self.config, name) != value]
        if differ:
            sizes = ", ".join(f"{name}={getattr(self.config, name)} there and {here[name]} here" for name in differ)
            why = " (the vocabulary here is the text's)" if "vocab_size" in differ else ""
            raise ValueError(f"init_from={self.path!r}: must be a model of this run's sizes; {sizes}{why}")

    def note(self) -> str:
        """Notes for the user: where the weights come from, and what was assumed."""
        source = f"weights from {self.path}; the optimizer and the learning rate start anew"
        if self.characters is not None or Path(self.path).is_dir():
            return source
        assumed = f"{self.path} does not store its characters; the sorted characters of this text are assumed"
        return f"{source}\nnote: {assumed}"


def read_initial(path: str) -> Initial:
    """The model at `path`. Raises ValueError with one line if it is not a makeMoE model."""
    place = Path(path)
    if not place.exists():
        allowed = "a run, a folder, or a .pt or .safetensors file"
        raise ValueError(f"init_from={path!r}: must be {allowed}; it does not exist")
    choices = None if place.is_dir() else Choices(top_k=1)  # a file does not tell top_k: the run's setting decides
    try:
        checkpoint = load(place, choices)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{place}: ")
        reason = "must be a makeMoE language model" if reason.startswith("top_k: must be a setting of") else reason
        raise ValueError(f"init_from={path!r}: {reason}") from None
    if not checkpoint.of_characters:
        hint = "; --pretrained fine-tunes it" if checkpoint.family == "decoder" else ""
        raise ValueError(f"init_from={path!r}: must be a makeMoE language model, is {checkpoint.name}{hint}")
    return Initial(path, checkpoint.module, checkpoint.characters)
