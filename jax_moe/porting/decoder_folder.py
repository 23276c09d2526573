"""A Hugging Face model in our own form: an Orbax folder whose config.json keeps the text of theirs, or a run's checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from jax_moe.config.as_json import config_from_json
from jax_moe.config.models import DecoderConfig, Origin
from jax_moe.models.decoder import Decoder
from jax_moe.porting.errors import PortError
from jax_moe.porting.formats.found import Found, find
from jax_moe.porting.formats.hf_folder import open_folder
from jax_moe.porting.formats.own_folder import read_about, stored_arrays
from jax_moe.porting.formats.run_folder import PRETRAINED, checkpoint_arrays
from jax_moe.porting.state_dict import abstract_decoder, decoder_shapes
from jax_moe.porting.tensors import DTYPES, Header

Opened = tuple[Origin, Decoder, dict[str, Header]]


def open_decoder(path: Path) -> Opened:
    """Where the decoder came from, its shapes without numbers, and its arrays still to be read.

    Of an Orbax folder, or of a fine-tuned run that is not at its end: then the weights are those of its newest checkpoint.
    Raises ValueError with everything in which the arrays do not fit the contract.
    """
    found = find(path)
    if not found.decoder:
        raise ValueError(f"{path}: must hold a Hugging Face model, holds {found.family or 'a file'}")
    return _open_run(found) if found.kind == "run" else _open_folder(path)


def _open_folder(path: Path) -> Opened:
    about = read_about(path)
    where = path / "config.json"
    config = config_from_json(DecoderConfig, about.get("config"), f"{where}: config")
    said = about.get("origin")
    if not isinstance(said, dict) or not all(isinstance(said.get(name), str) for name in ("model_type", "config_json")):
        raise ValueError(f"{where}: origin={said!r}: must be an object with model_type and config_json")
    origin = Origin(model_type=said["model_type"], config_json=said["config_json"], directory=str(path.absolute()))
    arrays, model = stored_arrays(path, about), abstract_decoder(config, origin)
    _check(path, arrays, decoder_shapes(model))
    return origin, model, arrays


def _open_run(found: Found) -> Opened:
    """The weights of a checkpoint in the dtypes of the folder that the run began with, as the run itself writes them."""
    with open_folder(_beginning(found)) as folder:
        origin, model = folder.origin, folder.model
        dtypes = {piece.ours: np.dtype(folder.headers[piece.theirs].dtype) for piece in folder.plan.pieces}
    arrays = checkpoint_arrays(found.place)
    _check(found.place, arrays, decoder_shapes(model))
    return origin, model, {name: _as(one, dtypes[name]) for name, one in arrays.items()}


def _beginning(found: Found) -> Path:
    """The folder with the run's config.json and tokenizer: what the run has written, or what it began with."""
    began = Path(str(found.about["model"]["pretrained"]))
    for place in (found.path / PRETRAINED, began):
        if (place / "config.json").is_file():
            return place
    raise ValueError(f"{found.path}: began with the model in {began}, which is not there any more and says what the weights are")


def _as(header: Header, dtype: np.dtype) -> Header:
    def reader(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        return lambda: read().astype(dtype)

    return header if header.dtype == dtype else replace(header, dtype=dtype, read=reader(header.read))


def _check(path: Path, arrays: Mapping[str, Header], shapes: Mapping[str, tuple[int, ...]]) -> None:
    error = PortError(
        str(path),
        missing=[name for name in shapes if name not in arrays],
        unexpected=[name for name in arrays if name not in shapes],
        misshapen=[
            f"{name} is {arrays[name].shape}, must be {shape}"
            for name, shape in shapes.items() if name in arrays and arrays[name].shape != shape
        ],
        mistyped=[f"{name} is {one.dtype}, must be a float" for name, one in arrays.items() if one.dtype not in DTYPES.values()],
    )
    if error:
        raise error
