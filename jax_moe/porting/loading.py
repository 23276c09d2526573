"""`jax_moe.load` and `jax_moe.save`: a model from whatever is at a path, and back in the form that the path's ending says."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jax_moe.config.moe import MoEConfig
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.porting import checkpoint
from jax_moe.porting.checkpoint import LAYOUTS, Checkpoint
from jax_moe.porting.formats.found import find
from jax_moe.porting.formats.own_folder import is_folder
from jax_moe.porting.formats.state_file import SUFFIXES, write_state
from jax_moe.porting.pretrained import load_pretrained, save_pretrained
from jax_moe.porting.recognise import ASKED, Choices, config_of
from jax_moe.porting.state_dict import to_torch
from jax_moe.porting.targets import saving
from jax_moe.soft_moe import SoftMoE


def load(
    path: str | os.PathLike[str], dtype: Any = None, mesh: Mesh | None = None, *, allow_nonfinite: bool = False, **choices: Any
) -> Any:
    """The model at `path`: MakeMoE, MoE, SoftMoE or Decoder, its contract at `.config`.

    `path` is a Hugging Face folder, a folder of `save` or `jax-moe port` (Orbax too), a run of train.py, finished or not (its
    newest weights), or a .pt or .safetensors file under the names of makeMoE, a Mixtral block, a Switch layer or Soft MoE.
    `choices` say what a file's weights do not tell (top_k, capacity_factor, ..., as `jax-moe inspect --help` lists them); what
    neither says is assumed as published, with a warning. `mesh` is for Hugging Face folders, as in `load_pretrained`.
    Raises ValueError for anything that is not a whole checkpoint.
    """
    place, given = Path(path), _choices(choices)
    found = find(place)
    if found.kind == "hf" and not given.given():
        return load_pretrained(found.place, dtype, mesh, allow_nonfinite=allow_nonfinite)
    if mesh is not None:
        raise ValueError("mesh: must be left out: only a Hugging Face folder is placed on one as it is read")
    read = checkpoint.load(place, given, allow_nonfinite=allow_nonfinite, dtype=_name(dtype))
    if read.assumed:
        said = ", ".join(f"{name}={value!r}" for name, value in read.assumed.items())
        warnings.warn(f"{place}: does not say, and assumed was {said}; jax_moe.load(path, {said}) says it", stacklevel=2)
    return read.module


def save(
    model: nnx.Module, path: str | os.PathLike[str], *, overwrite: bool = False, model_type: str | None = None,
    characters: str | None = None,
) -> None:
    """Writes the model whole or not at all, read back bit for bit; `load` reads it.

    A path that ends in .pt, .pth, .bin or .safetensors becomes a file under the original project's names; any other a folder:
    of a Decoder a Hugging Face folder (`model_type` as in `save_pretrained`), of the others config.json and the weights.
    `characters` go into a MakeMoE's folder, for `jax-moe generate`. Raises ValueError if `path` exists (without `overwrite`),
    cannot be written, or is a file that could not say what the layer is.
    """
    place = Path(path)
    if characters is not None and not (isinstance(model, MakeMoE) and len(set(characters)) == model.config.vocab_size):
        raise ValueError(f"characters={characters!r:.60}: must be a MakeMoE's vocab_size different characters, or left out")
    if isinstance(model, Decoder):
        if place.suffix in SUFFIXES:
            raise ValueError(f"{place}: must be a folder for a Hugging Face model, without the ending {place.suffix}")
        save_pretrained(model, place, model_type=model_type, overwrite=overwrite)
        return
    if model_type is not None:
        raise ValueError(f"model_type={model_type!r}: must be left out: only a Decoder has one")
    whole = Checkpoint(_family(model), model, characters)
    if place.suffix in SUFFIXES:
        if whole.family == "moe":
            raise ValueError(f"{place}: must be a folder: its contract is of no family whose file alone would tell it")
        with saving(place, overwrite, Path.is_file) as part:
            write_state(part, whole.state())
        return
    with saving(place, overwrite, is_folder) as part:
        checkpoint.save(whole, part)


def _family(model: nnx.Module) -> str:
    """Under whose names: of a sparse layer, the family whose file together with its choices says this very contract."""
    if isinstance(model, MakeMoE):
        return "makemoe"
    if isinstance(model, SoftMoE):
        return "soft_moe"
    if not isinstance(model, MoE):
        raise ValueError(f"model={type(model).__name__}: must be a MakeMoE, MoE, SoftMoE or Decoder")
    for family in ("mixtral", "makemoe_layer", "switch"):
        try:
            shapes = {name: value.shape for name, value in to_torch(model, layout=LAYOUTS[family]).items()}
            told = config_of(family, shapes, _choices(_chosen(model, family)))
            if isinstance(told, MoEConfig) and replace(told, dispatcher=model.config.dispatcher) == model.config:
                return family  # how tokens are moved is no part of the contract
        except ValueError:
            continue
    return "moe"


def _chosen(model: MoE, family: str) -> dict[str, Any]:
    """The settings that a file of the family would leave open, as this layer has them."""
    rule = model.config.capacity
    slots = None if rule is None else rule.slots
    factor = "none" if rule is None else rule.factor
    values: Mapping[str, Any] = {
        "top_k": model.config.top_k, "dropout": model.config.expert.dropout, "expert_capacity": slots,
        "capacity_factor": None if slots is not None else factor,
    }
    return {name: values[name] for name in ASKED[family]}


def _choices(choices: Mapping[str, Any]) -> Choices:
    known = [one.name for one in fields(Choices)]
    unknown = [name for name in choices if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: must be one of {', '.join(known)}")
    return Choices(**choices)


def _name(dtype: Any) -> str | None:
    """numpy's name of a float dtype. Raises ValueError for another."""
    from jax_moe.porting.pretrained import float_dtype

    return None if dtype is None else float_dtype(dtype).name
