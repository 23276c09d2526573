"""A module with its contract, in memory and as a folder: `config.json` with `weights.safetensors` or an Orbax checkpoint."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_moe.config.as_json import config_from_json
from jax_moe.config.checks import shorten
from jax_moe.config.models import MakeMoEConfig
from jax_moe.disk import verify, writing
from jax_moe.models.decoder import Decoder
from jax_moe.porting.decoder_folder import open_decoder
from jax_moe.porting.families.family import MODULES
from jax_moe.porting.formats.found import Found, find
from jax_moe.porting.formats.hf_folder import copy_others
from jax_moe.porting.formats.orbax import verify_orbax, write_orbax
from jax_moe.porting.formats.own_folder import Storage, about_folder, is_folder, stored_arrays, write_about
from jax_moe.porting.formats.run_folder import checkpoint_arrays
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from jax_moe.porting.formats.state_file import PT_SUFFIXES, read_state
from jax_moe.porting.formats.wrapped import own_names
from jax_moe.porting.pretrained import read_pretrained
from jax_moe.porting.recognise import Choices, assumed_choices, config_of, recognise
from jax_moe.porting.state_dict import abstract_module, flatten, from_torch, kept_names, load_ours, to_torch
from jax_moe.porting.tensors import DTYPES, all_finite
from jax_moe.stored import kept_paths, stored_state

LAYOUTS = {
    "makemoe": "makemoe", "makemoe_layer": "makemoe", "mixtral": "mixtral", "moe": "torch_ref", "soft_moe": "soft_moe",
    "switch": "switch",
}
FLOATS = {dtype.name: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Checkpoint:
    """A module, the family whose names it is written under, and its characters if it is a language model that has them.

    `assumed` are the settings that a file does not say and nobody gave; `note` says which of a run's weights these are.
    """

    family: str
    module: nnx.Module
    characters: str | None = None
    assumed: dict[str, Any] = field(default_factory=dict)
    note: str | None = None

    @property
    def config(self) -> Any:
        """The contract."""
        return self.module.config  # type: ignore[attr-defined]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """{our path: array}."""
        return flatten(stored_state(self.module))

    def state(self) -> dict[str, np.ndarray]:
        """{their name: array}."""
        return to_torch(self.module, layout=LAYOUTS.get(self.family))

    @property
    def name(self) -> str:
        """The family, and of a decoder Hugging Face's word for it."""
        return self.module.origin.model_type if isinstance(self.module, Decoder) and self.module.origin else self.family


def load(path: Path, choices: Choices | None = None, *, allow_nonfinite: bool = False, dtype: str | None = None) -> Checkpoint:
    """A checkpoint in any form: a folder of ours or Hugging Face's, a run of train.py (its newest weights), or a file.

    Files are `.pt` or `.safetensors` under a family's own names; of a training file its weights. `choices` say what a file's
    weights do not tell; a folder knows. Raises ValueError for what is not a whole checkpoint, of no known family, or holds
    NaN or infinity.
    """
    choices, found = choices or Choices(), find(path)
    if found.kind == "file":
        state, note = read_file(path)
        return checkpoint_of(path, state, choices, allow_nonfinite=allow_nonfinite, dtype=dtype, note=note)
    if choices.given():
        raise ValueError(f"{', '.join(choices.given())}: must be left out for a folder, config.json has them")
    if found.kind == "hf":
        model, note = read_pretrained(found.place, dtype, None, allow_nonfinite)
        return _noted(Checkpoint("decoder", model, note=note), found)
    if found.decoder:
        return _noted(_load_decoder(path, allow_nonfinite, dtype), found)
    return _noted((_load_run if found.run else _load_folder)(found, allow_nonfinite, dtype), found)


def _noted(checkpoint: Checkpoint, found: Found) -> Checkpoint:
    return checkpoint if found.run is None else replace(checkpoint, note=found.run.in_words())


def read_file(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The state dict of a file; of a trainer's, the model's, and where it stood."""
    if path.suffix in PT_SUFFIXES and path.is_file():
        from jax_moe.porting.formats.torch_pickle import read_whole_pt

        opened = read_whole_pt(path)
        return opened.state, opened.note
    return read_state(path), None


def checkpoint_of(
    path: Path, state: dict[str, np.ndarray], choices: Choices, *, allow_nonfinite: bool = False, dtype: str | None = None,
    note: str | None = None,
) -> Checkpoint:
    """As `load`, of a state dict that was read from a file."""
    state, family, taken = _recognised(path, state)
    if family is None:
        has = ", ".join(shorten(name, 60) for name in list(state)[:8])
        kinds = "makeMoE, Mixtral block, Switch layer or Soft MoE"
        hint = "; a Hugging Face model is read from its folder, config.json included" if "model.layers." in has else ""
        raise ValueError(f"{path}: must be a {kinds} checkpoint; its names begin with {has}{hint}")
    _refuse_nonfinite(path, state, allow_nonfinite)
    try:
        config = config_of(family, {name: value.shape for name, value in state.items()}, choices)
        abstract = _module_for(family, config, state, np.dtype(np.float32))
        state = _converted(state, dtype, kept_names(abstract, state, LAYOUTS[family]))
        module = _module_for(family, config, state)
        assumed = assumed_choices(family, config, choices)
        note = ", ".join(filter(None, (note, f"names without {' and '.join(taken)}" if taken else None))) or None
        return Checkpoint(family, from_torch(module, state, layout=LAYOUTS[family]), assumed=assumed, note=note)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _recognised(path: Path, state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str | None, list[str]]:
    """The state dict without what wrappers add to its names, its family, and what was taken off."""
    try:
        own, taken = own_names(state, known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    state = {own[name]: value for name, value in state.items()}
    return state, recognise({name: value.shape for name, value in state.items()}), taken


def known(names: Iterable[str]) -> bool:
    """Whether they are a family's."""
    return recognise(dict.fromkeys(names, ())) is not None


def save(checkpoint: Checkpoint, path: Path, *, overwrite: bool = False, storage: Storage = "safetensors") -> None:
    """Writes the folder whole or not at all, once its weights read back bit for bit. A decoder's storage is Orbax."""
    storage = "orbax" if checkpoint.family == "decoder" else storage
    weights, origin = checkpoint.weights, checkpoint.module.origin if isinstance(checkpoint.module, Decoder) else None
    about = about_folder(
        checkpoint.family, checkpoint.config, storage, characters=checkpoint.characters,
        origin=None if origin is None else (origin.model_type, origin.config_json),
    )
    with writing(path, overwrite, replaceable=is_folder) as part:
        if storage == "orbax":
            about["files"] = write_orbax(part, weights)
            verify_orbax(part, about["files"], weights, lambda _: None)
        else:
            part.mkdir()
            write_safetensors(part / "weights.safetensors", weights)
            verify(weights, read_safetensors(part / "weights.safetensors"), path)
        write_about(part, about)
        if origin is not None:
            copy_others(Path(origin.directory), part)


def _module_for(family: str, config: Any, weights: Mapping[str, np.ndarray], dtype: np.dtype | None = None) -> nnx.Module:
    """The abstract module, in the weights' dtype unless another is given.

    Raises ValueError if the contract asks for far more numbers than the weights are, before anything of that size is made or
    named: a few missing tensors are named one by one later.
    """
    module = abstract_module(family, config, dtype or _float_dtype(weights))
    asked = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module)))
    held = sum(value.size for value in weights.values())
    if asked > 100 * held + 10_000:
        raise ValueError(f"the contract asks for {asked:,} numbers: must be those of the weights, which are {held:,}")
    return module


def _load_folder(found: Found, allow_nonfinite: bool, dtype: str | None) -> Checkpoint:
    path, about = found.path, found.about
    weights = _read_weights(path, about)
    _refuse_nonfinite(path, weights, allow_nonfinite)
    config = config_from_json(MODULES[about["family"]][1], about.get("config"), f"{path / 'config.json'}: config")
    characters = about.get("characters")
    if characters is not None and len(characters) != config.vocab_size:
        raise ValueError(f"{path}: characters must be vocab_size={config.vocab_size} long, has {len(characters)}")
    return Checkpoint(about["family"], _filled(path, about["family"], config, weights, dtype), characters)


def _filled(path: Path, family: str, config: Any, weights: dict[str, np.ndarray], dtype: str | None) -> nnx.Module:
    """The module with weights under our names, as `dtype` but for those that keep their own."""
    try:
        kept = kept_paths(_module_for(family, config, weights, np.dtype(np.float32)))
        weights = _converted(weights, dtype, kept)
        others = {name: value for name, value in weights.items() if name not in kept}
        return load_ours(_module_for(family, config, weights, _float_dtype(others)), weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_weights(path: Path, about: dict[str, Any]) -> dict[str, np.ndarray]:
    if about.get("storage") == "orbax":
        return {name: one.read() for name, one in stored_arrays(path, about).items()}
    return read_state(path / "weights.safetensors")


def _load_decoder(path: Path, allow_nonfinite: bool, dtype: str | None) -> Checkpoint:
    _, model, arrays = open_decoder(path)
    weights = _converted({name: one.read() for name, one in arrays.items()}, dtype, kept_paths(model))
    _refuse_nonfinite(path, weights, allow_nonfinite)
    typed = [  # each array keeps its own dtype
        (keys, v.replace(jax.ShapeDtypeStruct(v.shape, weights[".".join(map(str, keys))].dtype)))
        for keys, v in nnx.to_flat_state(stored_state(model))
    ]
    nnx.update(model, nnx.from_flat_state(typed))
    return Checkpoint("decoder", load_ours(model, weights))


def _load_run(found: Found, allow_nonfinite: bool, dtype: str | None) -> Checkpoint:
    """A makeMoE: from what it leaves at its end, or from a checkpoint of either framework."""
    path, about, place = found.path, found.about, found.place
    ours = place.is_dir()
    weights = {name: one.read() for name, one in checkpoint_arrays(place).items()} if ours else read_file(place)[0]
    _refuse_nonfinite(path, weights, allow_nonfinite)
    config = config_from_json(MakeMoEConfig, about["model"], f"{path / 'config.json'}: model")
    text = about.get("text")
    characters = text.get("vocabulary") if isinstance(text, dict) else None
    if characters is not None and not (isinstance(characters, str) and len(set(characters)) == config.vocab_size):
        raise ValueError(f"{path / 'config.json'}: text.vocabulary: must be vocab_size={config.vocab_size} different characters")
    if ours:
        return Checkpoint("makemoe", _filled(place, "makemoe", config, weights, dtype), characters)
    try:
        weights = _converted(weights, dtype, frozenset())  # a makeMoE model: nothing keeps its dtype
        module = from_torch(_module_for("makemoe", config, weights), weights)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return Checkpoint("makemoe", module, characters)


def _converted(state: Mapping[str, np.ndarray], dtype: str | None, kept: Collection[str]) -> dict[str, np.ndarray]:
    """Every float as `dtype`, but those named in `kept`."""
    if dtype is None:
        return dict(state)
    return {
        name: value.astype(FLOATS[dtype]) if value.dtype in FLOATS.values() and name not in kept else value
        for name, value in state.items()
    }


def _float_dtype(state: Mapping[str, np.ndarray]) -> np.dtype:
    """The commonest float dtype, so that loading names the ones that differ; fp64 needs jax's x64 mode."""
    found = [value.dtype for value in state.values() if value.dtype in FLOATS.values()]
    dtype = max(set(found), key=lambda one: (found.count(one), str(one))) if found else np.dtype(np.float32)
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("holds float64: jax needs JAX_ENABLE_X64=1 for it")
    return dtype


def _refuse_nonfinite(path: Path, state: Mapping[str, np.ndarray], allow: bool) -> None:
    floats = {name: value for name, value in state.items() if value.dtype in FLOATS.values()}
    bad = [] if allow else [name for name, value in floats.items() if not all_finite(value)]
    if bad:
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ValueError(f"{path}: NaN or infinity in {', '.join(bad[:20])}{more} (allow_nonfinite=True takes them as they are)")
