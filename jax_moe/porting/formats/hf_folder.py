"""A Hugging Face folder opened by its headers: contract, names, shapes and dtypes, without reading weights."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.config.checks import require
from jax_moe.config.models import DecoderConfig, Origin
from jax_moe.disk import same_bits
from jax_moe.guarded import read_json, read_text_and_object
from jax_moe.parameters import declared
from jax_moe.porting.errors import MixtureOnlyError, PortError
from jax_moe.porting.families import family_named, has_mixture
from jax_moe.porting.families.family import Family
from jax_moe.porting.formats.carried import apart
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.own_folder import instead
from jax_moe.porting.formats.quantised import read_scheme, without_scheme
from jax_moe.porting.formats.shards import INDEX, SINGLE, files_of, open_weights
from jax_moe.porting.formats.wrapped import own_names
from jax_moe.porting.state_dict import abstract_decoder
from jax_moe.porting.table.plan import check, make_plan
from jax_moe.porting.tensors import Header

OPTIMIZER = "optimizer.pt"  # torch.optim's state_dict(), as transformers' Trainer writes it beside the weights
# Files beside config.json and the weights that are copied unchanged. Code (.py) never is.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)


NO_WEIGHTS = "rotary_emb.inv_freq"  # follows from config.json; transformers ignores it too, and no longer writes it
TIED = "must be {}, as tie_word_embeddings=true says; set it to false in config.json to keep this head"


def is_hf(path: Path) -> bool:
    """Whether a folder's config.json is one of Hugging Face's."""
    try:
        values = read_json(path / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and is_hf_config(values)


def is_hf_config(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of Hugging Face's."""
    return "format" not in values and ("model_type" in values or "architectures" in values)


def open_folder(path: Path, read: tuple[str, dict[str, Any]] | None = None) -> Found:
    """The folder, its names and shapes checked against its config.json; `read` is that file's text and values, if read.

    Raises ValueError (PortError for weights) with everything that is wrong, as far as headers tell.
    """
    text, values = _read_config(path) if read is None else read
    if instead(path):
        raise ValueError(f"{path}: must be a model alone{instead(path)}")  # transformers would add it to the model
    file, model_type = path / "config.json", values.get("model_type")
    try:
        family = family_named(model_type)
    except ValueError as error:
        message = f"{file}: {error}"
        raise (MixtureOnlyError(message, values) if has_mixture(model_type) else ValueError(message)) from None
    with _named(file):
        scheme = read_scheme(values)
    found = open_weights(path, scheme)
    first = family.first_of_layers(values)
    own, taken = own_names(found, lambda names: any(name.startswith(first) for name in names))
    headers = {own[name]: header for name, header in found.items() if not name.endswith(NO_WEIGHTS)}
    with _named(file):
        check_weights_name(values)
        check_layers(family.text_settings(values), headers)
        config = family.config(values)
        headers, carried = apart(family, values, config.num_layers, headers)
        check_sizes(config, headers)
    text = without_scheme(text, values)
    origin = Origin(
        model_type=family.name, config_json=text, directory=str(path.absolute()), carried=tuple(sorted(carried))
    )
    model = abstract_decoder(config, origin)
    plans = [make_plan(table, declared(model)) for table in (family.on_disk(config), family.in_memory(config))]
    plan = min(plans, key=lambda plan: len(plan.names ^ headers.keys()))
    headers, head = _tied_head_apart(family, config, headers, path)
    check(plan, headers, f"{path} (layout {plan.table.name})")
    state = path / OPTIMIZER
    return Found(
        path=path, kind="hf", place=path, family=family, config=config, tensors=headers, ours=False, origin=origin,
        model=model, plan=plan, head=head, optimizer=state if state.is_file() else None,
        unwrapped=f"names without {' and '.join(taken)}" if taken else None,
        quantised=None if scheme is None else scheme.words,
    )


def weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights. `open_folder` must have checked its index."""
    return [path / name for name in files_of(path)[0]]


def check_head(found: Found) -> None:
    """Raises PortError if a stored tied head is not the embedding, bit for bit: two tensors, read."""
    if found.head is None:
        return
    head, embedding = map(found.family.whole.named, ("head", "embedding"))
    if not same_bits(found.head.read(), found.tensors[embedding].read()):
        assert found.plan is not None
        raise PortError(f"{found.place} (layout {found.plan.table.name})", wrong=[f"{head} {TIED.format(embedding)}"])


def check_weights_name(values: Mapping[str, Any]) -> None:
    """Raises ValueError for the entry that makes transformers read a file of another name, so other weights."""
    named = values.get("transformers_weights")
    require(named is None, "transformers_weights", named, f"left out: weights are read from {SINGLE} or {INDEX}")


def check_layers(values: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
    """Raises ValueError for more layers than tensors, before anything is made per layer."""
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(headers):
        raise ValueError(f"num_hidden_layers={layers}: must fit the weights, which are {len(headers)} tensors")


def check_sizes(config: DecoderConfig, headers: Mapping[str, Header]) -> None:
    """Raises ValueError for a size that no tensor can have, before anything of that size is made."""
    held = sum(math.prod(header.shape) for header in headers.values())
    moe = config.moe
    sizes = {
        "vocab_size": config.vocab_size, "model_dim": config.model_dim,
        **{name: size for layer in dict.fromkeys(config.layers) for name, size in layer.attention.sizes().items()},
        "num_layers * num_experts": len(config.moe_layers) * moe.num_experts, "expert_dim": moe.expert_dim,
        "dense_dim": config.dense_dim, "shared_dim": moe.expert.shared_dim,
    }
    wrong = [f"{name}={size}" for name, size in sizes.items() if size > held]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: must fit the weights, which are {held} numbers")


def config_text(text: str | None, values: Mapping[str, Any], dtype: np.dtype) -> str:
    """The text of config.json, changed only if the weights have a new dtype."""
    names = [name for name in ("dtype", "torch_dtype") if name in values] or ["dtype"]
    if text is not None and all(values.get(name) in (dtype.name, None) for name in names):
        return text
    return json.dumps({**values, **dict.fromkeys(names, dtype.name)}, indent=2) + "\n"


def copy_others(source: Path, part: Path) -> None:
    """Copies the tokenizer's files and the like, unchanged."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, part / name)


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_dir():
        raise ValueError(f"{path}: must be a folder" if path.exists() else f"{path}: no such folder")
    try:
        return read_text_and_object(path / "config.json")
    except FileNotFoundError:
        raise ValueError(f"{path}: must be a checkpoint folder, has no config.json") from None


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors begin with the file's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _tied_head_apart(
    family: Family, config: DecoderConfig, headers: dict[str, Header], path: Path
) -> tuple[dict[str, Header], Header | None]:
    names = [family.whole.named(ours) for ours in ("head", "embedding")]
    head, embedding = map(headers.get, names)
    if not config.tied_embeddings or head is None or embedding is None:
        return headers, None
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        raise PortError(str(path), wrong=[f"{names[0]} is {head.dtype}{list(head.shape)}, {TIED.format(names[1])}"])
    return {name: header for name, header in headers.items() if name != names[0]}, head
