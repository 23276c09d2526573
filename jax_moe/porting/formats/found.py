"""What is at a path: the answer that every command works on, made once by `open_path`."""

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
    step: int | None  # None: only the final weights are left, and they do not say
    steps: int | None  # of the whole run, as its settings say
    final: bool  # what the run leaves at its end, or when it was stopped

    def in_words(self) -> str:
        """Which weights these are."""
        of = "" if self.steps is None else f" of {self.steps:,}"
        said = "the run's last weights" if self.step is None else f"step {self.step:,}{of} of the run"
        return f"{said}, from {self.place.name if self.final else f'{self.place.parent.name}/{self.place.name}'}"

    @property
    def unfinished(self) -> bool:
        """Whether the run has steps to go."""
        return self.step is not None and self.steps is not None and self.step < self.steps


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is there. Contract and names are judged; tensors can be read as long as this is held."""

    path: Path  # as it was asked for
    kind: Kind
    place: Path  # what is read: `path` or, of a run, its newest weights
    family: Family
    config: Any  # the contract
    tensors: dict[str, Header]  # still to be read
    ours: bool  # whether they are named by our paths, or as the family names them
    run: RunWeights | None = None  # of a run, which of its weights are read
    assumed: dict[str, Any] = field(default_factory=dict)  # settings that a file does not say and nobody gave
    unwrapped: str | None = None  # what was taken from a wrapper's names, in words
    optimizer: Any = None  # an optimizer's state, if any: the file beside the weights or, of a file, torch's state dict
    # Of a Hugging Face model, in whatever form
    origin: Origin | None = None
    model: Decoder | None = None  # shapes, no numbers
    plan: Plan | None = None  # how names of theirs and our paths go together; None where the tensors have our paths
    head: Header | None = None  # a tied head that is stored all the same, not among the tensors
    # Of all else
    characters: str | None = None  # a language model's, where it has them
    dictionary: Opened | None = None  # what a trainer's file holds beside the state dict

    @property
    def decoder(self) -> bool:
        """Whether it is a Hugging Face model, in whatever form."""
        return self.model is not None

    @property
    def folder(self) -> Path:
        """The folder that is carried: of a fine-tuned run that has ended, the Hugging Face folder in it."""
        return self.place if self.kind == "hf" else self.path

    @property
    def note(self) -> str | None:
        """How a file or folder was read, where that is worth saying."""
        within = None if self.dictionary is None else self.dictionary.note
        return ", ".join(filter(None, (within, self.unwrapped))) or None

    @property
    def note_of_training(self) -> str | None:
        """As `note`, where what stands beside the weights comes along."""
        within = "" if self.dictionary is None else self.dictionary.within
        said = f'from "{within}" of a dictionary' if within not in ("", "model") else None
        return ", ".join(filter(None, (said, self.unwrapped))) or None

    @property
    def stored(self) -> dict[str, Header]:
        """All tensors, a tied head among them."""
        return self.tensors if self.head is None else {**self.tensors, self.family.whole.named("head"): self.head}
