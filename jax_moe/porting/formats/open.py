"""Opens a path: a Hugging Face folder, our own folder, a run of train/train.py or a checkpoint in it, or a file."""

from dataclasses import replace
from pathlib import Path

from jax_moe.config.checks import shorten
from jax_moe.config.choices import Choices
from jax_moe.guarded import read_text_and_json
from jax_moe.porting.families import recognise
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.hf_folder import is_hf_config, open_folder
from jax_moe.porting.formats.own_folder import RUN, checked_about, instead, open_own
from jax_moe.porting.formats.run_folder import CHECKPOINTS, open_run, run_of
from jax_moe.porting.formats.state_file import read_whole
from jax_moe.porting.formats.wrapped import Opened, own_names
from jax_moe.porting.tensors import in_memory


def open_path(path: Path, choices: Choices | None = None) -> Found:
    """The checkpoint at `path`, its config.json read once; `choices` are settings that a file's weights do not tell.

    Raises ValueError for anything but a checkpoint, for an unknown family, for tensors that do not fit the contract (as
    far as headers tell), for a run without weights yet, and for choices with a folder, whose config.json has them.
    """
    if not path.is_dir():
        return open_file(path, choices or Choices())
    refuse_choices(choices)
    file = path / "config.json"
    run = run_of(path)
    if run is not None:
        return open_run(run, checked_about(run / "config.json", read_text_and_json(run / "config.json")[1]), path)
    if not file.exists():
        raise ValueError(f"{path}: must be a checkpoint folder, has no config.json{instead(path)}{_hint(path)}")
    text, values = read_text_and_json(file)
    if isinstance(values, dict) and is_hf_config(values):
        return open_folder(path, (text, values))
    about = checked_about(file, values)
    return open_run(path, about) if about["format"] == RUN else open_own(path, about)


def refuse_choices(choices: Choices | None) -> None:
    """Raises ValueError for settings given with a folder, whose config.json has them."""
    given = {} if choices is None else choices.given()
    if given:
        raise ValueError(f"{', '.join(given)}: must be left out for a folder, config.json has them")


def open_file(path: Path, choices: Choices) -> Found:
    """A file with a state dict, or with a trainer's dictionary around it; it is read whole."""
    opened = read_whole(path)
    try:
        own, taken = own_names(opened.state, lambda names: recognise(names) is not None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    state = {own[name]: value for name, value in opened.state.items()}
    family = recognise(state)
    if family is None or family.state is None:
        raise ValueError(f"{path}: {_unknown(list(state), opened)}")
    try:
        config = family.state.config(family.name, {name: value.shape for name, value in state.items()}, choices)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Found(
        path=path, kind="file", place=path, family=family, config=config, tensors=in_memory(state), ours=False,
        assumed=family.state.assumed(config, choices),
        unwrapped=f"names without {' and '.join(taken)}" if taken else None,
        optimizer=_renamed(opened.optimizer, own), dictionary=replace(opened, state=None),
    )


def _unknown(names: list[str], opened: Opened) -> str:
    """The message for a file of no known family."""
    whole = any("model.layers." in name for name in names)
    if whole and opened.optimizer is not None:
        here = "`model.save_pretrained(folder)` and `torch.save(optimizer.state_dict(), 'folder/optimizer.pt')`"
        return f"is of a Hugging Face model, whose config.json it lacks: must be a folder, made by {here}"
    has = ", ".join(shorten(name, 60) for name in names[:8])
    hint = "; a Hugging Face model is read from its folder, config.json included" if "model.layers." in has else ""
    return f"must be a makeMoE, Mixtral block, Switch layer or Soft MoE checkpoint; its names begin with {has}{hint}"


def _renamed(optimizer: object, own: dict[str, str]) -> object:
    """The optimizer's state dict, with wrapper parts removed from the names in its groups."""
    if not isinstance(optimizer, dict):
        return optimizer
    groups = [
        group | {key: [own.get(name, name) for name in group[key]] for key in ("param_names",) if key in group}
        for group in optimizer["param_groups"]
    ]
    return {**optimizer, "param_groups": groups}


def _hint(path: Path) -> str:
    """A hint for the user who named a run's checkpoint, or the folder of checkpoints, in place of the run."""
    for run in (path.parent, path.parent.parent):
        if CHECKPOINTS in (path.name, path.parent.name) and (run / "config.json").is_file():
            return f"; {run} is the run that it belongs to"
    return ""
