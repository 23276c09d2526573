"""Hugging Face folders: `load_pretrained` makes a Decoder of one, `save_pretrained` writes one."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_moe.decoder_config import DecoderConfig, Origin
from jax_moe.models.decoder import Decoder
from jax_moe.porting.engine import check, make_plan
from jax_moe.porting.families.hf import FAMILIES, decoder_tables, family_named
from jax_moe.porting.files import check_space, same_bits, writing
from jax_moe.porting.shards import DTYPES, Header, open_weights, write_weights
from jax_moe.porting.stacking import place_all, theirs_from
from jax_moe.sharding import mesh_in_use

# Beside config.json and the weights: copied as they are. Code (.py) never is.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)
MAX_SHARD_BYTES = 5_000_000_000


def load_pretrained(
    directory: str | os.PathLike[str], dtype: Any = None, mesh: Mesh | None = None, *, allow_nonfinite: bool = False
) -> Decoder:
    """The decoder in a folder that `transformers` or `save_pretrained` wrote.

    Weights keep the dtype they are stored in, unless `dtype` names another. One stacked array at a time passes through host
    memory; on a `mesh` (or the one that `jax.set_mesh` has set) experts are split over its expert axis, one device's part at
    a time. Raises ValueError (PortError for weights) with everything that is wrong; runs no code found there.
    """
    path = Path(directory)
    text, values = _read_config(path)
    target = None if dtype is None else _float_dtype(dtype)
    with _named(path / "config.json"):
        family = family_named(values.get("model_type"))
    with open_weights(path) as headers:
        with _named(path / "config.json"):
            _check_layers(values, headers)
            config = family.config(values)
            _check_sizes(config, headers)
        origin = Origin(model_type=family.model_type, config_json=text, directory=str(path.absolute()))
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), origin=origin))
        return _fill(model, headers, path, target, mesh or mesh_in_use(), allow_nonfinite)


def save_pretrained(
    model: Decoder, directory: str | os.PathLike[str], *, model_type: str | None = None, overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json, the weights under the family's own names and, of a loaded model, the tokenizer's files.

    Whole or not at all. `model_type` names the family of a decoder that was not loaded. Raises ValueError if the folder
    exists (without `overwrite`) or cannot be written, or if the family cannot say this contract.
    """
    path = Path(directory)
    origin = model.origin
    if model_type is None and origin is None:
        raise ValueError(f"model_type=None: must be one of {', '.join(FAMILIES)} for a decoder that was not loaded")
    family = family_named(model_type or origin.model_type)  # type: ignore[union-attr]
    arrays = {".".join(map(str, keys)): v[...] for keys, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    loaded = origin is not None and origin.model_type == family.model_type
    values = json.loads(origin.config_json) if loaded else family.values(model.config)  # type: ignore[union-attr]
    plan = make_plan(decoder_tables(model.config, family.model_type)[0], {name: a.shape for name, a in arrays.items()})
    theirs = theirs_from(plan, arrays)
    stored = np.dtype(arrays["embedding"].dtype).name
    with writing(path, overwrite, replaceable=lambda old: (old / "config.json").is_file()) as part:
        check_space(path, sum(header.nbytes for header in theirs.values()))
        part.mkdir()
        write_weights(part, theirs, max_shard_bytes)
        (part / "config.json").write_text(_config_text(origin.config_json if loaded else None, values, stored), encoding="utf-8")  # type: ignore[union-attr]
        if loaded:
            _copy_others(Path(origin.directory), part)  # type: ignore[union-attr]


def _config_text(original: str | None, values: dict[str, Any], dtype: str) -> str:
    """The text as it was loaded, unless the weights' dtype is another by now."""
    names = [name for name in ("dtype", "torch_dtype") if name in values] or ["dtype"]
    if original is not None and all(values.get(name) in (dtype, None) for name in names):
        return original
    return json.dumps(values | dict.fromkeys(names, dtype), indent=2) + "\n"


def _copy_others(source: Path, part: Path) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, part / name)


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_dir():
        raise ValueError(f"{path}: must be a folder" if path.exists() else f"{path}: no such folder")
    file = path / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path}: must be a checkpoint folder, has no config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: must be JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold an object")
    return text, values


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors begin with the file's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _check_layers(values: dict[str, Any], headers: Mapping[str, Header]) -> None:
    """Refuses, before anything is made for every layer, more layers than there are tensors."""
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(headers):
        raise ValueError(f"num_hidden_layers={layers}: must fit the weights, which are {len(headers)} tensors")


def _check_sizes(config: DecoderConfig, headers: Mapping[str, Header]) -> None:
    """Refuses, before anything of that size is named, a size that no tensor can have."""
    held = sum(math.prod(header.shape) for header in headers.values())
    moe = config.moe
    sizes = {
        "vocab_size": config.vocab_size, "model_dim": config.model_dim,
        "num_heads * head_dim": config.num_heads * config.head_dim,
        "num_layers * num_experts": len(config.moe_layers) * moe.num_experts, "expert_dim": moe.expert_dim,
        "dense_dim": config.dense_dim, "shared_dim": moe.expert.shared_dim,
    }
    wrong = [f"{name}={size}" for name, size in sizes.items() if size > held]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: must fit the weights, which are {held} numbers")


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        found = None
    if found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: must be None, float64, float32, float16 or bfloat16")
    return found


def _fill(
    model: Decoder, headers: dict[str, Header], path: Path, dtype: np.dtype | None, mesh: Mesh | None, allow_nonfinite: bool
) -> Decoder:
    flat = {".".join(map(str, keys)): (keys, v) for keys, v in nnx.to_flat_state(nnx.state(model))}
    shapes = {name: v.shape for name, (_, v) in flat.items()}
    assert model.origin is not None
    plans = [make_plan(table, shapes) for table in decoder_tables(model.config, model.origin.model_type)]
    plan = min(plans, key=lambda plan: len(plan.names ^ headers.keys()))
    headers = _without_tied_head(model, headers)
    check(plan, headers, f"{path} (layout {plan.table.name})")
    arrays = place_all(plan, headers, dtype, mesh, allow_nonfinite, str(path))
    filled = [(flat[name][0], flat[name][1].replace(array)) for name, array in arrays.items()]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def _without_tied_head(model: Decoder, headers: dict[str, Header]) -> dict[str, Header]:
    """A tied head that was stored all the same is left out if it is the embedding, bit for bit."""
    head, embedding = headers.get("lm_head.weight"), headers.get("model.embed_tokens.weight")
    if not model.config.tied_embeddings or head is None or embedding is None or not same_bits(head.read(), embedding.read()):
        return headers
    return {name: header for name, header in headers.items() if name != "lm_head.weight"}
