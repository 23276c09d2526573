"""A module with its contract, in memory and as a folder: `config.json` with `weights.safetensors` or an Orbax checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from jax_moe.config import MakeMoEConfig, MoEConfig, SoftMoEConfig
from jax_moe.decoder_config import DecoderConfig, Origin
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.moe import MoE
from jax_moe.porting.api import flatten, from_torch, load_ours, to_torch
from jax_moe.porting.config_files import config_from_json, config_to_json
from jax_moe.porting.engine import PortError
from jax_moe.porting.files import read_safetensors, read_state, verify, write_safetensors, writing
from jax_moe.porting.hf_folder import decoder_shapes, is_hf
from jax_moe.porting.orbax_files import read_orbax, sums_from_json, verify_orbax, write_orbax
from jax_moe.porting.recognise import Choices, config_of, recognise
from jax_moe.porting.tensor_file import Header
from jax_moe.soft_moe import SoftMoE

FORMAT, VERSION = "jax_moe", 1
RUN = "run"  # a folder of train/train.py: the model's contract in config.json, its weights under makeMoE's names
MODULES: dict[str, tuple[type[nnx.Module], type]] = {
    "decoder": (Decoder, DecoderConfig),  # a Hugging Face model, always stored by Orbax
    "makemoe": (MakeMoE, MakeMoEConfig),
    "makemoe_layer": (MoE, MoEConfig),
    "mixtral": (MoE, MoEConfig),
    "moe": (MoE, MoEConfig),
    "soft_moe": (SoftMoE, SoftMoEConfig),
}
LAYOUTS = {"makemoe": "makemoe", "makemoe_layer": "makemoe", "mixtral": "mixtral", "moe": "torch_ref", "soft_moe": "soft_moe"}
Storage = Literal["safetensors", "orbax"]
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float64", "float32", "float16", "bfloat16")}


@dataclass(frozen=True)
class Checkpoint:
    """A module, the family whose names it is written under, and its characters if it is a language model that has them."""

    family: str
    module: nnx.Module
    characters: str | None = None

    @property
    def config(self) -> Any:
        """The contract."""
        return self.module.config  # type: ignore[attr-defined]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """{our path: array}."""
        return flatten(nnx.state(self.module))

    def state(self) -> dict[str, np.ndarray]:
        """{their name: array}."""
        return to_torch(self.module, layout=LAYOUTS.get(self.family))

    @property
    def name(self) -> str:
        """The family, and of a decoder Hugging Face's word for it."""
        return self.module.origin.model_type if isinstance(self.module, Decoder) and self.module.origin else self.family


def load(path: Path, choices: Choices | None = None, *, allow_nonfinite: bool = False, dtype: str | None = None) -> Checkpoint:
    """A checkpoint from a folder of ours or Hugging Face's, or from a `.pt` or `.safetensors` file under a family's own names.

    `choices` say what a file's weights do not tell; a folder knows. Raises ValueError for what is not a whole checkpoint,
    of no known family, or holds NaN or infinity.
    """
    choices = choices or Choices()
    if path.is_dir():
        if choices.given():
            raise ValueError(f"{', '.join(choices.given())}: must be left out for a folder, config.json has them")
        if is_hf(path):
            from jax_moe.porting.pretrained import load_pretrained

            return Checkpoint("decoder", load_pretrained(path, dtype))
        return _load_folder(path, allow_nonfinite, dtype)
    state = read_state(path)
    family = recognise({name: value.shape for name, value in state.items()})
    if family is None:
        has = ", ".join(list(state)[:8])
        raise ValueError(f"{path}: must be a makeMoE, Mixtral block or Soft MoE checkpoint; its names begin with {has}")
    _refuse_nonfinite(path, state, allow_nonfinite)
    try:
        config = config_of(family, {name: value.shape for name, value in state.items()}, choices)
        state = _converted(state, dtype)
        module = abstract_module(family, config, _float_dtype(state))
        return Checkpoint(family, from_torch(module, state, layout=LAYOUTS[family]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save(checkpoint: Checkpoint, path: Path, *, overwrite: bool = False, storage: Storage = "safetensors") -> None:
    """Writes the folder whole or not at all, once its weights read back bit for bit. A decoder's storage is Orbax."""
    storage = "orbax" if checkpoint.family == "decoder" else storage
    weights, origin = checkpoint.weights, getattr(checkpoint.module, "origin", None)
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


def about_folder(
    family: str, config: Any, storage: Storage, *, characters: str | None = None, origin: tuple[str, str] | None = None
) -> dict[str, Any]:
    """config.json of a folder; `origin` are a decoder's model_type and the text of its config.json."""
    about = {"format": FORMAT, "version": VERSION, "family": family, "config": config_to_json(config)}
    if storage != "safetensors":
        about["storage"] = storage
    if characters is not None:
        about["characters"] = characters
    if origin is not None:
        about["origin"] = {"model_type": origin[0], "config_json": origin[1]}
    return about


def write_about(path: Path, about: dict[str, Any]) -> None:
    """config.json into a folder."""
    (path / "config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_decoder(path: Path) -> tuple[Origin, DecoderConfig, dict[str, Header]]:
    """Where the decoder in a folder of ours came from, its contract, and its arrays still to be read.

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
    arrays, shapes = _read_orbax(path, about), decoder_shapes(config)
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
    return origin, config, arrays


def is_folder(path: Path) -> bool:
    """Whether this is a folder that `save` wrote."""
    try:
        return path.is_dir() and read_about(path)["format"] == FORMAT
    except ValueError:
        return False


def read_about(path: Path) -> dict[str, Any]:
    """config.json. Raises ValueError if it is not there, not JSON or not ours."""
    file = path / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: must be a checkpoint folder, has no config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: must be JSON ({error})") from None
    if isinstance(about, dict) and "format" not in about and "settings" in about and "model" in about:
        return {**about, "format": RUN}
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ValueError(f'{file}: must say "format": "{FORMAT}" and "version": {VERSION}')
    if about.get("family") not in MODULES:
        raise ValueError(f"{file}: family={about.get('family')!r}: must be one of {', '.join(MODULES)}")
    if about.get("storage", "safetensors") not in get_args(Storage):
        raise ValueError(f"{file}: storage={about['storage']!r}: must be one of {', '.join(get_args(Storage))}")
    characters = about.get("characters")
    if characters is not None and not (isinstance(characters, str) and len(set(characters)) == len(characters)):
        raise ValueError(f"{file}: characters must be a string without repeats")
    return about


def abstract_module(family: str, config: Any, dtype: np.dtype) -> nnx.Module:
    """The module with shapes and dtypes but no numbers yet; `from_torch` fills it."""
    make = MODULES[family][0]
    return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype)))  # type: ignore[call-arg]


def _load_folder(path: Path, allow_nonfinite: bool, dtype: str | None) -> Checkpoint:
    about = read_about(path)
    if about["format"] == RUN:
        return _load_run(path, about, allow_nonfinite, dtype)
    if about["family"] == "decoder":
        return _load_decoder(path, allow_nonfinite, dtype)
    weights = _read_weights(path, about)
    _refuse_nonfinite(path, weights, allow_nonfinite)
    config = config_from_json(MODULES[about["family"]][1], about.get("config"), f"{path / 'config.json'}: config")
    weights = _converted(weights, dtype)
    try:
        module = load_ours(abstract_module(about["family"], config, _float_dtype(weights)), weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    characters = about.get("characters")
    if characters is not None and len(characters) != config.vocab_size:
        raise ValueError(f"{path}: characters must be vocab_size={config.vocab_size} long, has {len(characters)}")
    return Checkpoint(about["family"], module, characters)


def _read_weights(path: Path, about: dict[str, Any]) -> dict[str, np.ndarray]:
    if about.get("storage") == "orbax":
        return {name: one.read() for name, one in _read_orbax(path, about).items()}
    return read_state(path / "weights.safetensors")


def _read_orbax(path: Path, about: dict[str, Any]) -> dict[str, Header]:
    return read_orbax(path, sums_from_json(about.get("files"), f"{path / 'config.json'}: files"))


def _load_decoder(path: Path, allow_nonfinite: bool, dtype: str | None) -> Checkpoint:
    origin, config, arrays = open_decoder(path)
    weights = _converted({name: one.read() for name, one in arrays.items()}, dtype)
    _refuse_nonfinite(path, weights, allow_nonfinite)
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), origin=origin))
    typed = [  # each array keeps its own dtype
        (keys, v.replace(jax.ShapeDtypeStruct(v.shape, weights[".".join(map(str, keys))].dtype)))
        for keys, v in nnx.to_flat_state(nnx.state(module))
    ]
    nnx.update(module, nnx.from_flat_state(typed))
    return Checkpoint("decoder", load_ours(module, weights))


def _load_run(path: Path, about: dict[str, Any], allow_nonfinite: bool, dtype: str | None) -> Checkpoint:
    file = path / "model.safetensors"
    if not file.exists():
        raise ValueError(f"{path}: must be a finished run, has no model.safetensors yet")
    state = _converted(read_state(file), dtype)
    _refuse_nonfinite(path, state, allow_nonfinite)
    config = config_from_json(MakeMoEConfig, about["model"], f"{path / 'config.json'}: model")
    try:
        module = from_torch(abstract_module("makemoe", config, _float_dtype(state)), state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    text = about.get("text")
    return Checkpoint("makemoe", module, text.get("vocabulary") if isinstance(text, dict) else None)


def _converted(state: Mapping[str, np.ndarray], dtype: str | None) -> dict[str, np.ndarray]:
    """Every float as `dtype`; the correction bias stays as it is."""
    if dtype is None:
        return dict(state)
    floats = set(DTYPES.values())
    return {
        name: value.astype(DTYPES[dtype]) if value.dtype in floats and not name.endswith("correction_bias") else value
        for name, value in state.items()
    }


def _float_dtype(state: Mapping[str, np.ndarray]) -> np.dtype:
    """The commonest float dtype, so that loading names the ones that differ; fp64 needs jax's x64 mode."""
    found = [value.dtype for value in state.values() if value.dtype in DTYPES.values()]
    dtype = max(set(found), key=lambda one: (found.count(one), str(one))) if found else np.dtype(np.float32)
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("holds float64: jax needs JAX_ENABLE_X64=1 for it")
    return dtype


def _refuse_nonfinite(path: Path, state: Mapping[str, np.ndarray], allow: bool) -> None:
    floats = {name: value for name, value in state.items() if value.dtype in DTYPES.values()}
    bad = [] if allow else [name for name, value in floats.items() if not np.isfinite(value).all()]
    if bad:
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ValueError(f"{path}: NaN or infinity in {', '.join(bad[:20])}{more} (--allow-nonfinite takes them as they are)")
