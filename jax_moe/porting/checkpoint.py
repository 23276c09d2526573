"""Checkpoints in memory and in any form on disk: a module, its contract and, after training, optimizer state."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_moe.config.choices import Choices
from jax_moe.disk import verify, writing
from jax_moe.models.decoder import Decoder
from jax_moe.porting.families import FAMILIES, family_named
from jax_moe.porting.families.family import Family
from jax_moe.porting.formats.carried import write_carried
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.hf_folder import copy_others
from jax_moe.porting.formats.open import open_path
from jax_moe.porting.formats.orbax import verify_orbax, write_orbax
from jax_moe.porting.formats.own_folder import DECODER, Storage, about_folder, is_folder, write_about
from jax_moe.porting.formats.safetensors import read_safetensors, write_safetensors
from jax_moe.porting.formats.state_file import write_state
from jax_moe.porting.optimizer.own_file import FILE, Optimizer, write_optimizer
from jax_moe.porting.optimizer.state import write_state_dict
from jax_moe.porting.optimizer.torch_file import left_out, optimizer_of, verify_torch
from jax_moe.porting.pretrained import read_pretrained
from jax_moe.porting.state_dict import abstract_module, flatten, from_torch, kept_names, load_ours, to_torch
from jax_moe.porting.tensors import DTYPES, all_finite
from jax_moe.stored import kept_paths, stored_state

FLOATS = {dtype.name: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Checkpoint:
    """A module, the family whose names it is written under, and the characters of a character model.

    `assumed` are the settings that neither file nor caller gave; `note` says which of a run's weights these are.
    """

    family: str  # a family's name, or "decoder" of a Hugging Face model
    module: nnx.Module
    characters: str | None = None
    assumed: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
    optimizer: Optimizer | None = None  # of a training checkpoint
    left_out: tuple[str, ...] = ()  # other entries of its file that JSON cannot hold

    @property
    def config(self) -> Any:
        """The contract."""
        return self.module.config  # type: ignore[attr-defined]

    @property
    def record(self) -> Family:
        """The record of its family."""
        origin = self.module.origin if isinstance(self.module, Decoder) else None
        return FAMILIES[self.family] if origin is None else family_named(origin.model_type)

    @property
    def name(self) -> str:
        """The family's name; of a decoder its model_type."""
        return self.record.name

    @property
    def layout(self) -> str | None:
        """The layout with the family's names; None for a decoder, whose file layout is used."""
        return None if self.family == DECODER or self.record.state is None else self.record.state.table.name

    @property
    def of_characters(self) -> bool:
        """Whether it is a character model: makeMoE."""
        return self.family != DECODER and self.record.state is not None and self.record.state.takes == "characters"

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """{our path: array}."""
        return flatten(stored_state(self.module))

    def state(self) -> dict[str, np.ndarray]:
        """{their name: array}."""
        return to_torch(self.module, layout=self.layout)


def load(
    path: Path, choices: Choices | None = None, *, allow_nonfinite: bool = False, dtype: str | None = None,
    with_optimizer: bool = False,
) -> Checkpoint:
    """A checkpoint in any form: our folder or Hugging Face's, a run of train.py (its newest weights), or a file.

    Files are `.pt` or `.safetensors` under a family's own names. A training file gives its weights and, with
    `with_optimizer`, the optimizer state. `choices` are the settings that a file's weights do not tell; a folder stores
    them. Raises ValueError for a damaged checkpoint, an unknown family, and NaN or infinity.
    """
    return load_found(open_path(path, choices), allow_nonfinite, dtype, with_optimizer)


def load_found(
    found: Found, allow_nonfinite: bool = False, dtype: str | None = None, with_optimizer: bool = False
) -> Checkpoint:
    """As `load`, from an opened path."""
    module = _module(found, allow_nonfinite, dtype)
    family, characters, assumed = DECODER if found.decoder else found.family.name, found.characters, found.assumed
    if with_optimizer and found.optimizer is not None:
        optimizer, left = optimizer_of(found, module), tuple(left_out(found))
        return Checkpoint(family, module, characters, assumed, found.note_of_training, optimizer, left)
    return Checkpoint(family, module, characters, assumed, found.note if found.run is None else found.run.in_words())


def _module(found: Found, allow_nonfinite: bool, dtype: str | None) -> nnx.Module:
    if not found.decoder:
        return _load_module(found, allow_nonfinite, dtype)
    if found.kind == "hf":
        return read_pretrained(found, dtype, None, allow_nonfinite)
    return _load_decoder(found, allow_nonfinite, dtype)


def save(checkpoint: Checkpoint, path: Path, *, overwrite: bool = False, storage: Storage = "safetensors") -> None:
    """Writes the folder whole or not at all, once it reads back bit for bit. A decoder's storage is Orbax."""
    origin = checkpoint.module.origin if isinstance(checkpoint.module, Decoder) else None
    storage, weights = "orbax" if checkpoint.family == DECODER else storage, checkpoint.weights
    about = about_folder(checkpoint.family, checkpoint.config, storage, characters=checkpoint.characters, origin=origin)
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
            write_carried(origin, part)
        if checkpoint.optimizer is not None:
            assert checkpoint.layout is not None
            write_optimizer(part / FILE, checkpoint.optimizer, checkpoint.module, checkpoint.layout)


def save_file(checkpoint: Checkpoint, path: Path, *, overwrite: bool = False) -> None:
    """Writes a file under the original names; with optimizer state a trainer's `.pt`, structured as it was read."""
    optimizer = checkpoint.optimizer
    if optimizer is None:
        write_state(path, checkpoint.state(), overwrite=overwrite)
        return
    from jax_moe.porting.formats.torch_pickle import read_training_pt, write_training_pt

    assert checkpoint.layout is not None
    state = _in_order(checkpoint.state(), optimizer.order)
    whole = {"model": state, "optimizer": write_state_dict(optimizer.moments, optimizer.groups, optimizer.order)}
    with writing(path, overwrite) as part:
        write_training_pt(part, {**whole, **optimizer.others})
        again = read_training_pt(part)
        assert again is not None
        verify(state, again["model"], path)
        verify_torch(optimizer, again["optimizer"], checkpoint.module, checkpoint.layout, path)


def _in_order(state: dict[str, np.ndarray], order: list[str]) -> dict[str, np.ndarray]:
    """The state dict with its parameters in the optimizer's order, which readers take from the file."""
    rest = iter(order)
    wanted = set(order)
    names = [next(rest) if name in wanted else name for name in state]
    return {name: state[name] for name in names}


def _module_for(found: Found, weights: Mapping[str, np.ndarray], dtype: np.dtype | None = None) -> nnx.Module:
    """The abstract module, in the weights' dtype unless another is given.

    Raises ValueError if the contract needs far more numbers than the file has, before anything of that size is made. A
    few missing tensors are listed later.
    """
    assert found.family.state is not None
    module = abstract_module(found.family.state.module, found.config, dtype or _float_dtype(weights))
    asked = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module)))
    held = sum(value.size for value in weights.values())
    if asked > 100 * held + 10_000:
        raise ValueError(f"the contract asks for {asked:,} numbers: must be those of the weights, which are {held:,}")
    return module


def _load_module(found: Found, allow_nonfinite: bool, dtype: str | None) -> nnx.Module:
    """A module that is no Hugging Face model, converted to `dtype` except for weights that keep their own."""
    assert found.family.state is not None
    weights, layout = {name: header.read() for name, header in found.tensors.items()}, found.family.state.table.name
    _refuse_nonfinite(found.path, weights, allow_nonfinite)
    try:
        abstract = _module_for(found, weights, np.dtype(np.float32))
        kept = kept_paths(abstract) if found.ours else kept_names(abstract, weights, layout)
        weights = _converted(weights, dtype, kept)
        others = {name: value for name, value in weights.items() if name not in kept}
        module = _module_for(found, weights, _float_dtype(others))
        return load_ours(module, weights) if found.ours else from_torch(module, weights, layout=layout)
    except ValueError as error:
        raise ValueError(f"{found.place}: {error}") from None


def _load_decoder(found: Found, allow_nonfinite: bool, dtype: str | None) -> Decoder:
    """A Hugging Face model from arrays under our paths; each keeps its dtype unless `dtype` is given."""
    model = found.model
    assert model is not None
    weights = _converted({name: header.read() for name, header in found.tensors.items()}, dtype, kept_paths(model))
    _refuse_nonfinite(found.path, weights, allow_nonfinite)
    typed = [
        (keys, v.replace(jax.ShapeDtypeStruct(v.shape, weights[".".join(map(str, keys))].dtype)))
        for keys, v in nnx.to_flat_state(stored_state(model))
    ]
    nnx.update(model, nnx.from_flat_state(typed))
    return load_ours(model, weights)


def _converted(state: Mapping[str, np.ndarray], dtype: str | None, kept: Collection[str]) -> dict[str, np.ndarray]:
    """Every float array converted to `dtype`, except those in `kept`."""
    if dtype is None:
        return dict(state)
    return {
        name: value.astype(FLOATS[dtype]) if value.dtype in FLOATS.values() and name not in kept else value
        for name, value in state.items()
    }


def _float_dtype(state: Mapping[str, np.ndarray]) -> np.dtype:
    """The commonest float dtype, so that loading names the arrays that differ; fp64 needs jax's x64 mode."""
    found = [value.dtype for value in state.values() if value.dtype in FLOATS.values()]
    dtype = max(set(found), key=lambda dtype: (found.count(dtype), str(dtype))) if found else np.dtype(np.float32)
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("holds float64: jax needs JAX_ENABLE_X64=1 for it")
    return dtype


def _refuse_nonfinite(path: Path, state: Mapping[str, np.ndarray], allow: bool) -> None:
    floats = {name: value for name, value in state.items() if value.dtype in FLOATS.values()}
    bad = [] if allow else [name for name, value in floats.items() if not all_finite(value)]
    if bad:
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ValueError(f"{path}: NaN or infinity in {', '.join(bad[:20])}{more} (allow_nonfinite=True accepts them)")
