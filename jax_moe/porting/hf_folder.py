"""A Hugging Face folder looked at through its headers: contract, names, shapes and dtypes, no weight read."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jax_moe.decoder_config import DecoderConfig
from jax_moe.models.decoder import Decoder
from jax_moe.porting.engine import Plan, PortError, check, make_plan
from jax_moe.porting.families.hf import decoder_tables, family_named
from jax_moe.porting.files import same_bits
from jax_moe.porting.shards import BIN, BIN_INDEX, INDEX, SINGLE, open_weights
from jax_moe.porting.tensor_file import Header

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HFFolder:
    """What a folder holds; `headers` can be read while it is open."""

    path: Path
    model_type: str
    text: str  # config.json
    config: DecoderConfig
    plan: Plan
    headers: dict[str, Header]
    head: Header | None  # a tied head that is stored all the same, not among the headers

    @property
    def shapes(self) -> Shapes:
        """{our path: shape}."""
        return self.plan.our_shapes

    @property
    def stored(self) -> dict[str, Header]:
        """All tensors of the files."""
        return self.headers if self.head is None else {**self.headers, "lm_head.weight": self.head}


def is_hf(path: Path) -> bool:
    """Whether a folder's config.json is one of Hugging Face's."""
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "format" not in values and ("model_type" in values or "architectures" in values)


@contextmanager
def open_folder(path: Path) -> Iterator[HFFolder]:
    """The folder, once its names and shapes are those of its config.json.

    Raises ValueError (PortError for weights) with everything that is wrong, so far as headers tell.
    """
    text, values = _read_config(path / "config.json")
    try:
        family = family_named(values.get("model_type"))
        config = family.config(values)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    shapes = decoder_shapes(config)
    plans = [make_plan(table, shapes) for table in decoder_tables(config, family.model_type)]
    with open_weights(path) as headers:
        plan = min(plans, key=lambda plan: len(plan.names ^ headers.keys()))
        headers, head = _tied_head_apart(config, headers)
        check(plan, headers, f"{path} (layout {plan.table.name})")
        yield HFFolder(path, family.model_type, text, config, plan, headers, head)


def weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights; of an opened folder, so that its index is known to be whole."""
    for single, index in ((SINGLE, INDEX), (BIN, BIN_INDEX)):
        if (path / index).is_file():
            listed = json.loads((path / index).read_text(encoding="utf-8"))["weight_map"]
            return [path / name for name in sorted(set(listed.values()))]
        if (path / single).exists():
            return [path / single]
    return []


def decoder_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """{our path: shape} of a decoder."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return {".".join(map(str, keys)): v.shape for keys, v in nnx.to_flat_state(nnx.state(model))}


def check_head(folder: HFFolder) -> None:
    """Raises PortError if a stored tied head is not the embedding, bit for bit: two tensors, read."""
    if folder.head is not None and not same_bits(folder.head.read(), folder.headers["model.embed_tokens.weight"].read()):
        raise PortError(f"{folder.path} (layout {folder.plan.table.name})", unexpected=["lm_head.weight"])


def config_text(text: str | None, values: dict[str, Any], dtype: np.dtype) -> str:
    """The text of config.json as it was, unless the weights' dtype is another by now."""
    names = [name for name in ("dtype", "torch_dtype") if name in values] or ["dtype"]
    if text is not None and all(values.get(name) in (dtype.name, None) for name in names):
        return text
    return json.dumps(values | dict.fromkeys(names, dtype.name), indent=2) + "\n"


def _read_config(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: must be JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold an object")
    return text, values


def _tied_head_apart(config: DecoderConfig, headers: dict[str, Header]) -> tuple[dict[str, Header], Header | None]:
    head, embedding = headers.get("lm_head.weight"), headers.get("model.embed_tokens.weight")
    if not config.tied_embeddings or head is None or embedding is None:
        return headers, None
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return headers, None
    return {name: header for name, header in headers.items() if name != "lm_head.weight"}, head
