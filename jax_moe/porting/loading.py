"""`jax_moe.load` and `jax_moe.save`: a model from any checkpoint, and back in the form that the path's suffix names."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jax_moe.config.choices import Choices
from jax_moe.models.decoder import Decoder
from jax_moe.porting import checkpoint
from jax_moe.porting.checkpoint import Checkpoint
from jax_moe.porting.families import families_of
from jax_moe.porting.families.family import Family
from jax_moe.porting.formats.open import open_path
from jax_moe.porting.formats.own_folder import is_folder
from jax_moe.porting.formats.state_file import SUFFIXES, write_state
from jax_moe.porting.pretrained import float_dtype, read_pretrained, save_pretrained
from jax_moe.porting.state_dict import their_shapes
from jax_moe.porting.targets import saving


def load(
    path: str | os.PathLike[str], dtype: Any = None, mesh: Mesh | None = None, *, allow_nonfinite: bool = False,
    **choices: Any,
) -> Any:
    """The model at `path`: MakeMoE, MoE, SoftMoE or Decoder, its contract at `.config`.

    `path` is a Hugging Face folder, a folder of `save` or `jax-moe port` (Orbax too), a run of train.py, finished or
    not (its newest weights are read), or a .pt or .safetensors file under the names of makeMoE, a Mixtral block, a
    Switch layer or Soft MoE. `choices` are settings that a file's weights do not tell (top_k, capacity_factor, ...;
    `jax-moe inspect --help` lists them); settings that neither gives take their published values, with a warning.
    `mesh` is for Hugging Face folders, as in `load_pretrained`. Raises ValueError for anything but a whole checkpoint.
    """
    place = Path(path)
    found = open_path(place, _choices(choices))
    if found.kind == "hf":
        if found.note is not None:
            warnings.warn(f"{found.place}: {found.note}", stacklevel=2)
        return read_pretrained(found, dtype, mesh, allow_nonfinite)
    if mesh is not None:
        raise ValueError("mesh: must be left out: only a Hugging Face folder is placed on one as it is read")
    read = checkpoint.load_found(found, allow_nonfinite, None if dtype is None else float_dtype(dtype).name)
    if read.assumed:
        said = ", ".join(f"{name}={value!r}" for name, value in read.assumed.items())
        warnings.warn(f"{place}: does not store {said}: assumed; jax_moe.load(path, {said}) sets it", stacklevel=2)
    return read.module


def save(
    model: nnx.Module, path: str | os.PathLike[str], *, overwrite: bool = False, model_type: str | None = None,
    characters: str | None = None,
) -> None:
    """Writes the model whole or not at all, verified by reading it back; `load` reads it.

    A path that ends in .pt, .pth, .bin or .safetensors becomes a file under the original project's names. Any other
    path becomes a folder: for a Decoder a Hugging Face folder (`model_type` as in `save_pretrained`), for other models
    config.json and the weights. `characters` go into a MakeMoE's folder, for `jax-moe generate`. Raises ValueError if
    `path` exists (without `overwrite`) or cannot be written, or if a file alone could not tell the contract.
    """
    place = Path(path)
    if isinstance(model, Decoder):
        _check_characters(characters, None)
        if place.suffix in SUFFIXES:
            raise ValueError(f"{place}: must be a folder for a Hugging Face model, without the ending {place.suffix}")
        save_pretrained(model, place, model_type=model_type, overwrite=overwrite)
        return
    whole = Checkpoint(_family(model).name, model, characters)
    _check_characters(characters, whole.config.vocab_size if whole.of_characters else None)
    if model_type is not None:
        raise ValueError(f"model_type={model_type!r}: must be left out: only a Decoder has one")
    if place.suffix in SUFFIXES:
        if whole.record.state is not None and whole.record.state.read is None:
            raise ValueError(f"{place}: must be a folder: a file of no family could tell this contract")
        with saving(place, overwrite, Path.is_file) as part:
            write_state(part, whole.state())
        return
    with saving(place, overwrite, is_folder) as part:
        checkpoint.save(whole, part)


def _check_characters(characters: str | None, vocab_size: int | None) -> None:
    if characters is not None and len(set(characters)) != vocab_size:
        allowed = "a MakeMoE's vocab_size different characters, or left out"
        raise ValueError(f"characters={characters!r:.60}: must be {allowed}")


def _family(model: nnx.Module) -> Family:
    """The family whose names to write: a file of it, with the file's choices, gives this very contract when loaded."""
    found = families_of(model)
    if not found:
        raise ValueError(f"model={type(model).__name__}: must be a MakeMoE, MoE, SoftMoE or Decoder")
    return next((family for family in found if len(found) > 1 and _says(family, model)), found[0])


def _says(family: Family, model: Any) -> bool:
    """Whether a file under the family's names, together with the user's choices, tells the contract of the model."""
    state = family.state
    assert state is not None
    try:
        choices = _choices(state.answers(model.config))
        told: Any = state.config(family.name, their_shapes(model, state.table.name), choices)
    except ValueError:
        return False
    # a file does not tell the dispatcher, which changes no answer
    return replace(told, dispatcher=model.config.dispatcher) == model.config


def _choices(choices: Mapping[str, Any]) -> Choices:
    known = [field.name for field in fields(Choices)]
    unknown = [name for name in choices if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: must be one of {', '.join(known)}")
    return Choices(**choices)
