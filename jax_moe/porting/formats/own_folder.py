"""config.json of our own folders: what is in them. A run of train/train.py is one of them, by another config.json."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from jax_moe.config.as_json import config_to_json
from jax_moe.config.checks import shorten
from jax_moe.guarded import read_json
from jax_moe.porting.families.family import MODULES
from jax_moe.porting.formats.orbax import read_orbax, sums_from_json
from jax_moe.porting.tensors import Header

FORMAT, VERSION = "jax_moe", 1
RUN = "run"  # a folder of train/train.py: the model's contract in config.json, its weights under makeMoE's names
Storage = Literal["safetensors", "orbax"]


def about_folder(
    family: str, config: Any, storage: Storage, *, characters: str | None = None, origin: tuple[str, str] | None = None
) -> dict[str, Any]:
    """config.json of a folder; `origin` are a decoder's model_type and the text of its config.json."""
    about = {"format": FORMAT, "version": VERSION, "family": family, "config": config_to_json(config)}
    if storage != "safetensors":
        about["storage"] = storage
    if characters is not None:
        about["characters"] = characters
    if origin is not None:
        about["origin"] = {"model_type": origin[0], "config_json": origin[1]}
    return about


def write_about(path: Path, about: dict[str, Any]) -> None:
    """config.json into a folder."""
    (path / "config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_folder(path: Path) -> bool:
    """Whether this is a folder that `save` wrote."""
    try:
        return path.is_dir() and read_about(path)["format"] == FORMAT
    except ValueError:
        return False


def read_about(path: Path) -> dict[str, Any]:
    """config.json. Raises ValueError if it is not there, not JSON or not ours."""
    file = path / "config.json"
    try:
        about = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: must be a checkpoint folder, has no config.json{instead(path)}") from None
    if isinstance(about, dict) and "format" not in about and "settings" in about and "model" in about:
        return {**about, "format": RUN}
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ValueError(f'{file}: must say "format": "{FORMAT}" and "version": {VERSION}')
    if not _among(about.get("family"), MODULES):
        raise ValueError(f"{file}: family={shorten(repr(about.get('family')))}: must be one of {', '.join(MODULES)}")
    if not _among(about.get("storage", "safetensors"), get_args(Storage)):
        raise ValueError(f"{file}: storage={shorten(repr(about['storage']))}: must be one of {', '.join(get_args(Storage))}")
    characters = about.get("characters")
    if characters is not None and not (isinstance(characters, str) and len(set(characters)) == len(characters)):
        raise ValueError(f"{file}: characters must be a string without repeats")
    return about


def instead(path: Path) -> str:
    """What a folder without a config.json is, where that can be told."""
    adapter = (path / "adapter_config.json").is_file()
    return "; it is an adapter (LoRA or like it): merge it into its model first, `model.merge_and_unload()`" if adapter else ""


def _among(value: Any, names: Iterable[str]) -> bool:
    return isinstance(value, str) and value in names


def stored_arrays(path: Path, about: dict[str, Any]) -> dict[str, Header]:
    """The arrays of a folder stored by Orbax, still to be read."""
    return read_orbax(path, sums_from_json(about.get("files"), f"{path / 'config.json'}: files"))
