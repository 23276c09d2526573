"""Quantised Hugging Face folders: which scheme config.json names, and the folder's tensors as its model computes them.

Nobody above sees a quantised tensor: `plain` gives names, shapes and dtypes after dequantisation, read one at a time.
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from jax_moe.config.checks import shorten
from jax_moe.porting.families.settings import Settings
from jax_moe.porting.formats.quantised.compressed_tensors import read_compressed_tensors
from jax_moe.porting.formats.quantised.fp8 import read_fp8
from jax_moe.porting.formats.quantised.mxfp4 import read_mxfp4
from jax_moe.porting.formats.quantised.scheme import Scheme
from jax_moe.porting.tensors import DTYPES, Header

FIELD = "quantization_config"
# By what config.json says as `quant_method`: the scheme of these settings, for a model computed in a dtype.
SCHEMES: dict[str, Callable[[Settings, np.dtype], Scheme]] = {
    "fp8": read_fp8, "mxfp4": read_mxfp4, "compressed-tensors": read_compressed_tensors,
}
FLOATS = {dtype.name: dtype for dtype in DTYPES.values()}


def read_scheme(values: Mapping[str, Any]) -> Scheme | None:
    """How a config.json says that weights are quantised; None: they are not. Raises ValueError naming every field of
    it that is not supported.
    """
    said = values.get(FIELD)
    if said in (None, {}):
        return None
    outer = Settings(values)
    if not isinstance(outer.take(FIELD, dict, None), dict):
        raise ValueError(outer.errors[0])
    settings = Settings(said, prefix=f"{FIELD}.")
    method = settings.choice("quant_method", next(iter(SCHEMES)), SCHEMES)
    if "quant_method" not in said:
        settings.wrong("quant_method", f"one of {', '.join(SCHEMES)}")
    scheme = None if settings.errors else SCHEMES[method](settings, computed_dtype(values))
    if settings.errors:
        raise ValueError("; ".join(dict.fromkeys(settings.errors)))
    return scheme


def computed_dtype(values: Mapping[str, Any]) -> np.dtype:
    """The dtype in which config.json says that the model computes; bfloat16 where it is silent."""
    named = next((values[name] for name in ("dtype", "torch_dtype") if values.get(name) is not None), "bfloat16")
    if not isinstance(named, str) or named.removeprefix("torch.") not in FLOATS:
        raise ValueError(f"dtype={shorten(repr(named))}: must be one of {', '.join(FLOATS)}")
    return FLOATS[named.removeprefix("torch.")]


def without_scheme(text: str, values: Mapping[str, Any]) -> str:
    """The text of config.json for weights that are no longer quantised; unchanged if they never were."""
    if read_scheme(values) is None:
        return text
    return json.dumps({name: value for name, value in values.items() if name != FIELD}, indent=2) + "\n"


def parts_of(scheme: Scheme | None, names: Collection[str]) -> dict[str, dict[str, str]]:
    """{tensor: {part: the stored tensor that is it}}; a tensor that is not quantised is its own part "weight"."""
    return {name: {"weight": name} for name in names} if scheme is None else scheme.grouped(names)


def plain(scheme: Scheme | None, headers: Mapping[str, Header]) -> tuple[dict[str, Header], list[str]]:
    """{tensor: header} as the model computes it, and a message for every quantised tensor that cannot be read."""
    if scheme is None:
        return dict(headers), []
    found, errors = dict[str, Header](), list[str]()
    for name, parts in scheme.grouped(headers).items():
        try:
            found[name] = scheme.tensor(name, {part: headers[stored] for part, stored in parts.items()})
        except ValueError as error:
            errors.append(str(error))
    return found, errors
