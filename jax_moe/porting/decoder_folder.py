"""A Hugging Face model in an Orbax folder of ours: its config.json keeps the text of theirs."""

from pathlib import Path

from jax_moe.decoder_config import DecoderConfig, Origin
from jax_moe.models.decoder import Decoder
from jax_moe.porting.about import read_about, stored_arrays
from jax_moe.porting.config_files import config_from_json
from jax_moe.porting.engine import PortError
from jax_moe.porting.hf_folder import abstract_decoder, decoder_shapes
from jax_moe.porting.tensor_file import DTYPES, Header


def open_decoder(path: Path) -> tuple[Origin, Decoder, dict[str, Header]]:
    """Where the decoder came from, its shapes without numbers, and its arrays still to be read.

    Raises ValueError with everything in which the arrays do not fit the contract.
    """
    about = read_about(path)
    if about.get("family") != "decoder":
        raise ValueError(f"{path}: must hold a Hugging Face model, holds {about.get('family', 'a run of makemoe')}")
    where = path / "config.json"
    config = config_from_json(DecoderConfig, about.get("config"), f"{where}: config")
    said = about.get("origin")
    if not isinstance(said, dict) or not all(isinstance(said.get(name), str) for name in ("model_type", "config_json")):
        raise ValueError(f"{where}: origin={said!r}: must be an object with model_type and config_json")
    origin = Origin(model_type=said["model_type"], config_json=said["config_json"], directory=str(path.absolute()))
    arrays, model = stored_arrays(path, about), abstract_decoder(config, origin)
    _check(path, arrays, decoder_shapes(model))
    return origin, model, arrays


def _check(path: Path, arrays: dict[str, Header], shapes: dict[str, tuple[int, ...]]) -> None:
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
