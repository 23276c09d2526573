"""What is at a path: the answer of `open_path`, on which every command works."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax_moe.config.models import Origin
from jax_moe.models.decoder import Decoder
from jax_moe.porting.families.family import Family
from jax_moe.porting.formats.wrapped import Opened
from jax_moe.porting.table.plan import Plan
from jax_moe.porting.tensors import Header

Kind = Literal["hf", "ours", "run", "file"]


@dataclass(frozen=True)
class RunWeights:
    """Where a run's newest weights are."""

    place: Path  # model.safetensors, pretrained/, checkpoints/STEP or checkpoints/STEP.pt
    step: int | None  # None: only the final weights are left, which do not tell
    steps: int | None  # of the whole run, from its settings
    final: bool  # written at the run's end, or when it was stopped

    def in_words(self) -> str:
        """A description of these weights."""
        of = "" if self.steps is None else f" of {self.steps:,}"
        said = "the run's last weights" if self.step is None else f"step {self.step:,}{of} of the run"
        return f"{said}, from {self.place.name if self.final else f'{self.place.parent.name}/{self.place.name}'}"

    @property
    def unfinished(self) -> bool:
        """Whether steps of the run remain."""
        return self.step is not None and self.steps is not None and self.step < self.steps


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint whose contract and names are checked; its tensors can be read as long as this object lives."""

    path: Path  # the argument of `open_path`
    kind: Kind
    place: Path  # what is read: `path` or a run's newest weights
    family: Family
    config: Any  # the contract
    tensors: dict[str, Header]  # still to be read
    ours: bool  # whether they have our paths, or the family's names
    run: RunWeights | None = None  # which of a run's weights are read
    assumed: dict[str, Any] = field(default_factory=dict)  # settings that neither file nor caller gave
    unwrapped: str | None = None  # the wrapper parts removed from names, in words
    optimizer: Any = None  # optimizer state, if any: the file beside the weights, or a training file's state dict
    # For a Hugging Face model in any form
    origin: Origin | None = None
    model: Decoder | None = None  # shapes, no numbers
    plan: Plan | None = None  # from the family's names to our paths; None if the tensors have our paths
    quantised: str | None = None  # how its folder stores the weights, in words; the tensors are as it computes them
    head: Header | None = None  # a tied head that is stored nevertheless, not among the tensors
    # For other models
    characters: str | None = None  # a character model's
    dictionary: Opened | None = None  # a trainer's dictionary around the state dict

    @property
    def decoder(self) -> bool:
        """Whether it is a Hugging Face model, in any form."""
        return self.model is not None

    @property
    def folder(self) -> Path:
        """The folder to copy: for a finished fine-tuning run, the Hugging Face folder in it."""
        return self.place if self.kind == "hf" else self.path

    @property
    def note(self) -> str | None:
        """A note for the user on how the file or folder was read; None if there is nothing special."""
        within = None if self.dictionary is None else self.dictionary.note
        return ", ".join(filter(None, (within, self.unwrapped))) or None

    @property
    def note_of_training(self) -> str | None:
        """As `note`, if the entries beside the weights are copied too."""
        within = "" if self.dictionary is None else self.dictionary.within
        said = f'from "{within}" of a dictionary' if within not in ("", "model") else None
        return ", ".join(filter(None, (said, self.unwrapped))) or None

    @property
    def stored(self) -> dict[str, Header]:
        """All tensors, including a stored tied head."""
        return self.tensors if self.head is None else {**self.tensors, self.family.whole.named("head"): self.head}
