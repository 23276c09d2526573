"""Folders of our own: config.json with `weights.safetensors` or an Orbax checkpoint, also of Hugging Face models.

config.json tells them from a run of train/train.py.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jax_moe.config.as_json import config_from_json, config_to_json
from jax_moe.config.checks import shorten
from jax_moe.config.models import DecoderConfig, Origin
from jax_moe.config.parameters import Declared
from jax_moe.guarded import read_json
from jax_moe.parameters import declared
from jax_moe.porting.errors import check_names
from jax_moe.porting.families import FAMILIES, family_named
from jax_moe.porting.formats.carried import carried_names
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.orbax import read_orbax, sums_from_json
from jax_moe.porting.formats.state_file import read_state
from jax_moe.porting.state_dict import abstract_decoder
from jax_moe.porting.tensors import DTYPES, Header, in_memory

FORMAT, VERSION = "jax_moe", 1
RUN = "run"  # a folder of train/train.py: the model's contract in config.json, its weights under makeMoE's names
DECODER = "decoder"  # in config.json in place of the family of a Hugging Face model, whose origin is stored
OPTIMIZER = "optimizer.safetensors"
Storage = Literal["safetensors", "orbax"]


def about_folder(
    family: str, config: Any, storage: Storage, *, characters: str | None = None, origin: Origin | None = None
) -> dict[str, Any]:
    """The content of a folder's config.json; `origin` is for a decoder."""
    about = {"format": FORMAT, "version": VERSION, "family": family, "config": config_to_json(config)}
    if storage != "safetensors":
        about["storage"] = storage
    if characters is not None:
        about["characters"] = characters
    if origin is not None:
        carried = {"carried": list(origin.carried)} if origin.carried else {}
        about["origin"] = {"model_type": origin.model_type, "config_json": origin.config_json, **carried}
    return about


def write_about(path: Path, about: dict[str, Any]) -> None:
    """Writes config.json into a folder."""
    (path / "config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_folder(path: Path) -> bool:
    """Whether this is a folder that `save` wrote."""
    try:
        return path.is_dir() and checked_about(path, read_json(path / "config.json"))["format"] == FORMAT
    except (OSError, ValueError):
        return False


def checked_about(file: Path, about: Any) -> dict[str, Any]:
    """The content of config.json, checked. Raises ValueError unless it is that of our folder or of a run."""
    if isinstance(about, dict) and "format" not in about and "settings" in about and "model" in about:
        return {**about, "format": RUN}
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ValueError(f'{file}: must say "format": "{FORMAT}" and "version": {VERSION}')
    families = [DECODER, *sorted(name for name, record in FAMILIES.items() if record.state is not None)]
    if not _among(about.get("family"), families):
        raise ValueError(f"{file}: family={shorten(repr(about.get('family')))}: must be one of {', '.join(families)}")
    if not _among(about.get("storage", "safetensors"), get_args(Storage)):
        raise ValueError(
            f"{file}: storage={shorten(repr(about['storage']))}: must be one of {', '.join(get_args(Storage))}"
        )
    characters = about.get("characters")
    if characters is not None and not (isinstance(characters, str) and len(set(characters)) == len(characters)):
        raise ValueError(f"{file}: characters must be a string without repeats")
    return about


def instead(path: Path) -> str:
    """A hint on what a folder without a config.json is, or ""."""
    adapter = (path / "adapter_config.json").is_file()
    hint = "; it is an adapter (LoRA or like it): merge it into its model first, `model.merge_and_unload()`"
    return hint if adapter else ""


def _among(value: Any, names: Iterable[str]) -> bool:
    return isinstance(value, str) and value in names


def open_own(path: Path, about: dict[str, Any]) -> Found:
    """The folder whose config.json is `about`. Raises ValueError naming everything that does not fit the contract."""
    if about["family"] == DECODER:
        return _open_decoder(path, about)
    family = FAMILIES[about["family"]]
    assert family.state is not None
    config = config_from_json(family.state.contract, about.get("config"), f"{path / 'config.json'}: config")
    characters = about.get("characters")
    if characters is not None and len(characters) != config.vocab_size:
        raise ValueError(f"{path}: characters must be vocab_size={config.vocab_size} long, has {len(characters)}")
    orbax = about.get("storage") == "orbax"
    tensors = _stored_arrays(path, about) if orbax else in_memory(read_state(path / "weights.safetensors"))
    return Found(
        path=path, kind="ours", place=path, family=family, config=config, tensors=tensors, ours=True,
        characters=characters,
        optimizer=optimizer_in(path),
    )


def _open_decoder(path: Path, about: dict[str, Any]) -> Found:
    """A Hugging Face model stored by Orbax, with the text of its config.json."""
    where = path / "config.json"
    config = config_from_json(DecoderConfig, about.get("config"), f"{where}: config")
    said = about.get("origin")
    if not isinstance(said, dict) or not all(isinstance(said.get(name), str) for name in ("model_type", "config_json")):
        raise ValueError(f"{where}: origin={shorten(repr(said))}: must be an object with model_type and config_json")
    origin = Origin(
        model_type=said["model_type"], config_json=said["config_json"], directory=str(path.absolute()),
        carried=carried_names(said, str(where)),
    )
    arrays, model = _stored_arrays(path, about), abstract_decoder(config, origin)
    check_arrays(path, arrays, declared(model))
    return Found(
        path=path, kind="ours", place=path, family=family_named(origin.model_type), config=config, tensors=arrays,
        ours=True, origin=origin, model=model, optimizer=optimizer_in(path),
    )


def optimizer_in(path: Path) -> Path | None:
    """The file with the optimizer state in a folder of ours."""
    return path / OPTIMIZER if (path / OPTIMIZER).is_file() else None


def check_arrays(path: Path, arrays: Mapping[str, Header], wanted: Mapping[str, Declared]) -> None:
    """Raises PortError naming all arrays, by our path, that are not as the decoder declares them."""
    no_floats = {name: header.dtype for name, header in arrays.items() if header.dtype not in DTYPES.values()}
    mistyped = [f"{name} is {dtype}, must be a float" for name, dtype in no_floats.items()]
    check_names(str(path), arrays, wanted, mistyped=mistyped)


def _stored_arrays(path: Path, about: dict[str, Any]) -> dict[str, Header]:
    """The arrays of a folder stored by Orbax, read on demand."""
    return read_orbax(path, sums_from_json(about.get("files"), f"{path / 'config.json'}: files"))
