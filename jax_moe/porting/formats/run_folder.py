"""The folder of a run of train/train.py: where its newest weights are, and the weights of a checkpoint.

config.json holds settings, model and text. checkpoints/STEP is an Orbax checkpoint of {"params", "optimizer"}, whole once
checkpoints/STEP.sha256 has the sums of its files; checkpoints/STEP.pt is PyTorch's. A run that has ended leaves
model.safetensors under makeMoE's names or, fine-tuned, the Hugging Face folder pretrained/.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_moe.config.checks import shorten
from jax_moe.guarded import is_file
from jax_moe.porting.formats.orbax import Sums, damaged, read_orbax
from jax_moe.porting.tensors import Header

CHECKPOINTS, MODEL, PRETRAINED = "checkpoints", "model.safetensors", "pretrained"


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
        return f"{said}, from {self.place.name if self.final else f'{CHECKPOINTS}/{self.place.name}'}"

    @property
    def unfinished(self) -> bool:
        """Whether the run has steps to go."""
        return self.step is not None and self.steps is not None and self.step < self.steps


def is_finetune(about: Mapping[str, Any]) -> bool:
    """Whether the run trains a Hugging Face model."""
    return isinstance(about.get("model"), dict) and "pretrained" in about["model"]


def newest_weights(folder: Path, about: Mapping[str, Any]) -> RunWeights:
    """The weights of the run's last step. Raises ValueError if it has none yet.

    What a run leaves at its end counts unless a checkpoint is newer: of a run that went on, or died before its end.
    """
    last = folder / (PRETRAINED if is_finetune(about) else MODEL)
    mark = last / "config.json" if is_finetune(about) else last
    settings = about.get("settings")
    steps = settings.get("steps") if isinstance(settings, dict) else None
    steps = steps if isinstance(steps, int) else None
    newest = _newest_checkpoint(folder / CHECKPOINTS)
    if newest is None:
        if not mark.is_file():
            raise ValueError(f"{folder}: is a run without weights yet: it has no {last.name}, and no checkpoint that is whole")
        return RunWeights(last, None, steps, True)
    step, place, written = newest
    final = mark.is_file() and mark.stat().st_mtime_ns >= written
    return RunWeights(last if final else place, step, steps, final)


def _newest_checkpoint(folder: Path) -> tuple[int, Path, int] | None:
    """Step, place and time in nanoseconds of the newest checkpoint that was written to its end."""
    found = [
        (int(sums.stem), folder / sums.stem, sums) for sums in folder.glob("*.sha256")
        if sums.stem.isdigit() and (folder / sums.stem).is_dir()
    ]
    found += [(int(file.stem), file, file) for file in folder.glob("*.pt") if file.stem.isdigit()]
    if not found:
        return None
    step, place, mark = max(found)
    return step, place, mark.stat().st_mtime_ns


def checkpoint_arrays(place: Path) -> dict[str, Header]:
    """{our path: header} of the weights in an Orbax checkpoint of a run. Raises ValueError unless its files are as written."""
    return read_orbax(place, _sums(place), within="params")


def _sums(place: Path) -> Sums:
    """Size and sha256 of every file; the run keeps no sizes, so those are the files' own."""
    file = place.with_name(f"{place.name}.sha256")
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise damaged(place, f"{file.name}: {error}") from None
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    wrong = [name for name in digests if not name.startswith(f"{place.name}/") or not is_file(place.parent / name)]
    if wrong or not digests:
        raise damaged(place, f"missing: {', '.join(map(shorten, wrong[:5])) or 'the sums of its files'}")
    return {
        name.removeprefix(f"{place.name}/"): ((place.parent / name).stat().st_size, digest) for name, digest in digests.items()
    }
