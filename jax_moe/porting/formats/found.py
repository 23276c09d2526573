"""What is at a path, asked once: a Hugging Face folder, a folder of ours, a run of train/train.py, or a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jax_moe.porting.formats.hf_folder import is_hf
from jax_moe.porting.formats.own_folder import RUN, instead, read_about
from jax_moe.porting.formats.run_folder import CHECKPOINTS, RunWeights, is_finetune, newest_weights

Kind = Literal["hf", "ours", "run", "file"]


@dataclass(frozen=True)
class Found:
    """The answer: what to read, and how."""

    path: Path  # as it was asked for
    kind: Kind
    place: Path  # what is read: of a fine-tuned run that has ended, the Hugging Face folder in it
    family: str | None  # None: a file, whose names tell it once they are read
    about: dict[str, Any]  # config.json of a folder of ours or of a run
    run: RunWeights | None  # of a run, which of its weights are read

    @property
    def decoder(self) -> bool:
        """Whether it is a Hugging Face model, in whatever form."""
        return self.family == "decoder"


def find(path: Path) -> Found:
    """What is there. Raises ValueError for a folder that is no checkpoint, and for a run that has no weights yet."""
    if not path.is_dir():
        return Found(path, "file", path, None, {}, None)
    if is_hf(path):
        return Found(path, "hf", path, "decoder", {}, None)
    if not (path / "config.json").exists():
        raise ValueError(f"{path}: must be a checkpoint folder, has no config.json{instead(path)}{_hint(path)}")
    about = read_about(path)
    if about["format"] != RUN:
        return Found(path, "ours", path, about["family"], about, None)
    weights = newest_weights(path, about)
    if not is_finetune(about):
        return Found(path, "run", weights.place, "makemoe", about, weights)
    if weights.final:
        return Found(path, "hf", weights.place, "decoder", about, weights)
    return Found(path, "run", weights.place, "decoder", about, weights)


def _hint(path: Path) -> str:
    """Where a checkpoint of a run, or the folder of all of them, was named in place of the run."""
    for run in (path.parent, path.parent.parent):
        if CHECKPOINTS in (path.name, path.parent.name) and (run / "config.json").is_file():
            return f"; {run} is the run that it belongs to"
    return ""
