"""Hugging Face folders: `load_pretrained` makes a Decoder of one, `save_pretrained` writes one."""

import json
import os
import shutil
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.decoder_config import Origin
from jax_moe.models.decoder import Decoder
from jax_moe.porting.engine import Piece, Plan, PortError, assemble, check, make_plan, take_apart
from jax_moe.porting.families.hf import FAMILIES, decoder_tables, family_named
from jax_moe.porting.files import same_bits, writing
from jax_moe.porting.shards import DTYPES, Header, open_weights, write_weights

# Beside config.json and the weights: copied as they are. Code (.py) never is.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)
MAX_SHARD_BYTES = 5_000_000_000


def load_pretrained(directory: str | os.PathLike[str], dtype: Any = None) -> Decoder:
    """The decoder in a folder that `transformers` or `save_pretrained` wrote.

    Weights keep the dtype they are stored in, unless `dtype` names another. They are read one tensor at a time into one
    stacked array at a time. Raises ValueError (PortError for weights) with everything that is wrong; runs no code found there.
    """
    path = Path(directory)
    text, values = _read_config(path)
    try:
        family = family_named(values.get("model_type"))
        config = family.config(values)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    origin = Origin(model_type=family.model_type, config_json=text, directory=str(path.absolute()))
    target = None if dtype is None else _float_dtype(dtype)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), origin=origin))
    with open_weights(path) as headers:
        return _fill(model, headers, path, target)


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
    stored = np.dtype(arrays["embedding"].dtype).name
    with writing(path, overwrite, replaceable=lambda old: (old / "config.json").is_file()) as part:
        part.mkdir()
        write_weights(part, _sizes(plan, arrays), _Theirs(plan, arrays), max_shard_bytes)
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


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        found = None
    if found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: must be None, float64, float32, float16 or bfloat16")
    return found


def _fill(model: Decoder, headers: dict[str, Header], path: Path, dtype: np.dtype | None) -> Decoder:
    flat = {".".join(map(str, keys)): (keys, v) for keys, v in nnx.to_flat_state(nnx.state(model))}
    shapes = {name: v.shape for name, (_, v) in flat.items()}
    assert model.origin is not None
    plans = [make_plan(table, shapes) for table in decoder_tables(model.config, model.origin.model_type)]
    plan = min(plans, key=lambda plan: len(plan.names ^ headers.keys()))
    headers = _without_tied_head(model, headers)
    check(plan, headers, f"{path} (layout {plan.table.name})")
    filled, not_finite = [], []
    for name, pieces in groupby(plan.pieces, key=lambda piece: piece.ours):
        value, bad = _stack(name, list(pieces), headers, shapes[name], dtype)
        not_finite += bad
        if not not_finite:
            keys, variable = flat[name]
            filled.append((keys, variable.replace(_place(value, name))))
    if not_finite:
        raise PortError(f"{path}: NaN or infinity", wrong=not_finite)
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def _without_tied_head(model: Decoder, headers: dict[str, Header]) -> dict[str, Header]:
    """A tied head that was stored all the same is left out if it is the embedding, bit for bit."""
    head, embedding = headers.get("lm_head.weight"), headers.get("model.embed_tokens.weight")
    if not model.config.tied_embeddings or head is None or embedding is None or not same_bits(head.read(), embedding.read()):
        return headers
    return {name: header for name, header in headers.items() if name != "lm_head.weight"}


def _stack(
    name: str, pieces: list[Piece], headers: Mapping[str, Header], shape: tuple[int, ...], dtype: np.dtype | None
) -> tuple[np.ndarray, list[str]]:
    """One of our arrays from its pieces, each read when its turn comes, and the names that are not finite."""
    value = np.empty(shape, dtype or headers[pieces[0].theirs].dtype)
    bad: dict[str, None] = {}
    for piece in pieces:
        tensor = headers[piece.theirs].read()
        if not np.isfinite(tensor).all():
            bad[piece.theirs] = None
        assemble(piece, tensor, value)
    return value, list(bad)


def _place(value: np.ndarray, name: str) -> Any:
    placed = jnp.asarray(value)
    if placed.dtype != value.dtype:
        raise PortError("jax would narrow the dtype (jax_enable_x64 is off)", mistyped=[f"{name} is {value.dtype}"])
    return placed


def _sizes(plan: Plan, arrays: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each of their tensors, in the order of the rows, so that one stacked array is taken apart after the other."""
    size = {piece.theirs: np.dtype(arrays[piece.ours].dtype).itemsize for piece in plan.pieces}
    return {name: size[name] * int(np.prod(plan.their_shapes[name])) for name in size}


class _Theirs:
    """Their tensors by name, taken from ours; the last two stacked arrays are kept on the host."""

    def __init__(self, plan: Plan, arrays: Mapping[str, Any]):
        self.plan, self.arrays = plan, arrays
        self.pieces: dict[str, list[Piece]] = {}
        for piece in plan.pieces:
            self.pieces.setdefault(piece.theirs, []).append(piece)
        self.host: dict[str, np.ndarray] = {}

    def __call__(self, name: str) -> np.ndarray:
        ours = {piece.ours: self._host(piece.ours) for piece in self.pieces[name]}
        dtypes = {value.dtype for value in ours.values()}
        if len(dtypes) > 1:
            raise PortError(f"layout {self.plan.table.name}", mistyped=[f"{name} would hold {' and '.join(map(str, dtypes))}"])
        value = np.empty(self.plan.their_shapes[name], next(iter(dtypes)))
        for piece in self.pieces[name]:
            take_apart(piece, ours[piece.ours], value)
        return value

    def _host(self, path: str) -> np.ndarray:
        if path not in self.host:
            if len(self.host) > 1:
                del self.host[next(iter(self.host))]
            self.host[path] = np.asarray(self.arrays[path])
        return self.host[path]
