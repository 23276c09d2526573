"""The folder of a run of train/train.py: its newest weights, finished or not.

config.json holds settings, model and text. checkpoints/STEP is an Orbax checkpoint of {"params", "optimizer"}, whole
once checkpoints/STEP.sha256 has the sums of its files; checkpoints/STEP.pt is PyTorch's. A run that has ended leaves
model.safetensors under makeMoE's names or, fine-tuned, the Hugging Face folder pretrained/.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.config.as_json import config_from_json
from jax_moe.config.checks import shorten
from jax_moe.config.models import MakeMoEConfig
from jax_moe.guarded import is_file
from jax_moe.parameters import declared
from jax_moe.porting.families.makemoe import MAKEMOE
from jax_moe.porting.formats.found import Found, RunWeights
from jax_moe.porting.formats.hf_folder import open_folder
from jax_moe.porting.formats.orbax import Sums, damaged, read_orbax
from jax_moe.porting.formats.own_folder import check_arrays
from jax_moe.porting.formats.state_file import read_whole
from jax_moe.porting.tensors import Header, in_memory
from jax_moe.stored import kept_paths

CHECKPOINTS, MODEL, PRETRAINED = "checkpoints", "model.safetensors", "pretrained"


def run_of(path: Path) -> Path | None:
    """The run whose checkpoint of one step is in the folder `path`, None if it is no such folder."""
    run = path.parent.parent
    inside = path.parent.name == CHECKPOINTS and path.name.isdecimal() and (run / "config.json").is_file()
    return run if inside else None


def open_run(path: Path, about: Mapping[str, Any], checkpoint: Path | None = None) -> Found:
    """The run whose config.json is `about`; its newest weights, or those of `checkpoint`.

    Raises ValueError if it has no weights yet, or they do not fit.
    """
    weights = newest_weights(path, about)
    if checkpoint is not None:
        weights = RunWeights(checkpoint, int(checkpoint.name), weights.steps, False)
    if not is_finetune(about):
        return _open_makemoe(path, about, weights)
    if weights.final:
        return replace(open_folder(weights.place), path=path, run=weights)
    return _open_finetune(path, about, weights)


def _open_makemoe(path: Path, about: Mapping[str, Any], run: RunWeights) -> Found:
    """A makeMoE run: its final weights, or a checkpoint of either framework."""
    config = config_from_json(MakeMoEConfig, about["model"], f"{path / 'config.json'}: model")
    text = about.get("text")
    characters = text.get("vocabulary") if isinstance(text, dict) else None
    if characters is not None and not (isinstance(characters, str) and len(set(characters)) == config.vocab_size):
        raise ValueError(
            f"{path / 'config.json'}: text.vocabulary: must be vocab_size={config.vocab_size} different characters"
        )
    ours = run.place.is_dir()
    return Found(
        path=path, kind="run", place=run.place, family=MAKEMOE, config=config, ours=ours, run=run,
        characters=characters,
        tensors=checkpoint_arrays(run.place) if ours else in_memory(read_whole(run.place).state),
    )


def _open_finetune(path: Path, about: Mapping[str, Any], run: RunWeights) -> Found:
    """A fine-tuning run's weights, in the dtypes of the folder that it began with, as in its final folder."""
    began = open_folder(_beginning(path, about))
    assert began.plan is not None and began.model is not None
    dtypes = {piece.ours: np.dtype(began.tensors[piece.theirs].dtype) for piece in began.plan.pieces}
    arrays = checkpoint_arrays(run.place)
    check_arrays(run.place, arrays, declared(began.model))
    kept = kept_paths(began.model)  # a correction bias that was trained is wider than the one it began with
    tensors = {name: header if name in kept else _as(header, dtypes[name]) for name, header in arrays.items()}
    return Found(
        path=path, kind="run", place=run.place, family=began.family, config=began.config, tensors=tensors, ours=True,
        run=run, origin=began.origin, model=began.model,
    )


def _beginning(path: Path, about: Mapping[str, Any]) -> Path:
    """The folder with the model's config.json and tokenizer: the run's pretrained/, or the folder it began with."""
    began = Path(str(about["model"]["pretrained"]))
    for place in (path / PRETRAINED, began):
        if (place / "config.json").is_file():
            return place
    raise ValueError(f"{path}: began with the model in {began}, whose config.json is needed but no longer exists")


def _as(header: Header, dtype: np.dtype) -> Header:
    def reader(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        return lambda: read().astype(dtype)

    return header if header.dtype == dtype else replace(header, dtype=dtype, read=reader(header.read))


def is_finetune(about: Mapping[str, Any]) -> bool:
    """Whether the run trains a Hugging Face model."""
    return isinstance(about.get("model"), dict) and "pretrained" in about["model"]


def newest_weights(folder: Path, about: Mapping[str, Any]) -> RunWeights:
    """The weights of the run's last step. Raises ValueError if it has none yet.

    The final weights count unless a checkpoint is newer: then the run was continued, or died before its end.
    """
    last = folder / (PRETRAINED if is_finetune(about) else MODEL)
    mark = last / "config.json" if is_finetune(about) else last
    settings = about.get("settings")
    steps = settings.get("steps") if isinstance(settings, dict) else None
    steps = steps if isinstance(steps, int) else None
    newest = _newest_checkpoint(folder / CHECKPOINTS)
    if newest is None:
        if not mark.is_file():
            raise ValueError(f"{folder}: is a run without weights yet: it has no {last.name} and no whole checkpoint")
        return RunWeights(last, None, steps, True)
    step, place, written = newest
    final = mark.is_file() and mark.stat().st_mtime_ns >= written
    return RunWeights(last if final else place, step, steps, final)


def _newest_checkpoint(folder: Path) -> tuple[int, Path, int] | None:
    """Step, place and time in nanoseconds of the newest complete checkpoint."""
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
    """{our path: header} of the weights in a run's Orbax checkpoint. Raises ValueError if its files have changed."""
    return read_orbax(place, _sums(place), within="params")


def _sums(place: Path) -> Sums:
    """Size and sha256 of every file; the run stores no sizes, so they are those of the files."""
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
        name.removeprefix(f"{place.name}/"): ((place.parent / name).stat().st_size, digest)
        for name, digest in digests.items()
    }
