"""Hugging Face folders: `load_pretrained` reads a Decoder, `save_pretrained` writes it."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_moe.disk import check_space
from jax_moe.guarded import parse_json
from jax_moe.models.decoder import Decoder
from jax_moe.parameters import declared
from jax_moe.porting.families import decoder_names, family_named
from jax_moe.porting.formats.carried import carried_by, placed
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.hf_folder import check_head, config_text, copy_others, open_folder
from jax_moe.porting.formats.shards import DTYPES, write_weights
from jax_moe.porting.table.arrays import place_all, theirs_from
from jax_moe.porting.table.plan import make_plan
from jax_moe.porting.targets import saving
from jax_moe.sharding.mesh import mesh_in_use
from jax_moe.stored import kept_paths, stored_state, stored_variables

MAX_SHARD_BYTES = 5_000_000_000


def load_pretrained(
    directory: str | os.PathLike[str], dtype: Any = None, mesh: Mesh | None = None, *, allow_nonfinite: bool = False
) -> Decoder:
    """The decoder in a folder that `transformers` or `save_pretrained` wrote.

    Weights keep their stored dtype unless `dtype` is given; a router's correction bias always keeps its own. One
    stacked array at a time passes through host memory. On a `mesh` (default: that of `jax.set_mesh`) experts are split
    over its expert axis, one device's part at a time. Raises ValueError (PortError for weights) with everything that is
    wrong; runs no code from the folder.
    """
    found = open_folder(Path(directory))
    model = read_pretrained(found, dtype, mesh, allow_nonfinite)
    if found.note is not None:
        warnings.warn(f"{directory}: {found.note}", stacklevel=2)
    return model


def read_pretrained(found: Found, dtype: Any, mesh: Mesh | None, allow_nonfinite: bool) -> Decoder:
    """As `load_pretrained`, from an opened Hugging Face folder, whose abstract model is filled."""
    target = None if dtype is None else float_dtype(dtype)
    model, plan = found.model, found.plan
    assert model is not None and plan is not None
    check_head(found)
    mesh, where = mesh or mesh_in_use(), str(found.place)
    arrays = place_all(plan, found.tensors, target, mesh, allow_nonfinite, where, kept_paths(model))
    flat = nnx.to_flat_state(stored_state(model))
    filled = [(keys, v.replace(arrays[".".join(map(str, keys))])) for keys, v in flat]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def save_pretrained(
    model: Decoder, directory: str | os.PathLike[str], *, model_type: str | None = None, overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json, the weights under the family's own names and, of a loaded model, the tokenizer's files.

    The folder is written whole or not at all. It may exist if it is empty; a checkpoint is replaced with `overwrite`;
    missing parents are made. `model_type` names the family of a decoder that was not loaded. Raises ValueError if the
    folder holds anything else or cannot be written, or if the family's config.json cannot express this contract.
    """
    path = Path(directory)
    origin = model.origin
    if model_type is None and origin is None:
        raise ValueError(
            f"model_type=None: must be one of {', '.join(decoder_names())} for a decoder that was not loaded"
        )
    family = family_named(model_type or origin.model_type)  # type: ignore[union-attr]
    loaded = origin if origin is not None and origin.model_type == family.name else None
    values = family.values(model.config) if loaded is None else parse_json(loaded.config_json, "config.json")
    arrays = {path: v[...] for path, v in stored_variables(model).items()}
    plan = make_plan(family.on_disk(model.config), declared(model))
    theirs = placed(family, values, theirs_from(plan, arrays)) | ({} if loaded is None else carried_by(loaded))
    text = config_text(None if loaded is None else loaded.config_json, values, np.dtype(arrays["embedding"].dtype))
    with saving(path, overwrite, lambda old: (old / "config.json").is_file()) as part:
        check_space(path, sum(header.nbytes for header in theirs.values()))
        part.mkdir()
        write_weights(part, theirs, max_shard_bytes)
        (part / "config.json").write_text(text, encoding="utf-8")
        if loaded is not None:
            copy_others(Path(loaded.directory), part)


def float_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype of a float dtype that weights may have. Raises ValueError for other dtypes."""
    try:
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        found = None
    if found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: must be None, float64, float32, float16 or bfloat16")
    return found
