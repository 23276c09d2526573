"""Checks values of settings, from a command line or a run's folder, against the types in their dataclass."""

import dataclasses
import math
import struct
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jax_moe.config.checks import require

LEAST, MOST = 2.0**-126, 2.0**128 - 2.0**104  # fp32's positive normal numbers


def check_values(config: Any) -> None:
    """Raises ValueError for the first field, nested dataclasses included, whose value is not of its declared type.

    A number must be a normal number of fp32, in which runs compute, or 0.
    """
    hints = get_type_hints(type(config))
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if dataclasses.is_dataclass(hints[setting.name]):
            check_values(value)
        else:
            _check(setting.name, value, hints[setting.name])


def with_floats(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values with integers as floats where the dataclass `kind` has floats: JSON may write 1.0 as 1."""
    hints = get_type_hints(kind)
    floats = {name for name, hint in hints.items() if float in (hint, *get_args(hint))}
    integers = {name: value for name, value in values.items() if name in floats and type(value) is int}
    return {**values, **{name: float(value) for name, value in integers.items() if abs(value) < MOST}}


def in_single(value: float) -> float:
    """The value rounded to fp32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def _check(name: str, value: Any, hint: Any) -> None:
    kinds = get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)
    literals = [allowed for kind in kinds if get_origin(kind) is Literal for allowed in get_args(kind)]
    optional = NoneType in kinds
    if value is None and optional:
        return
    also = " or None" if optional else ""
    if literals:
        known = isinstance(value, str) and value in literals
        require(known, name, value, f"one of {', '.join(map(repr, literals))}{also}")
    elif bool in kinds:
        require(isinstance(value, bool), name, value, f"True or False{also}")
    elif int in kinds:
        require(isinstance(value, int) and not isinstance(value, bool), name, value, f"an integer{also}")
    elif float in kinds:
        require(_is_single(value), name, value, f"0 or a number from {LEAST:.2g} to {MOST:.2g}, above or below 0{also}")
    else:
        require(isinstance(value, str), name, value, f"a text{also}")


def _is_single(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or (-MOST <= value <= MOST and math.isfinite(value) and abs(value) >= LEAST)
