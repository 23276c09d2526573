"""Contracts as JSON: dataclasses to plain values and back; errors name every unknown, missing or mistyped field."""

import dataclasses
import types
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jax_moe.config.attention import LayerAttention
from jax_moe.config.checks import shorten
from jax_moe.config.decoder import DecoderConfig, GroupedDecoder


def config_to_json(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings; a Fraction as "29/100". A decoder becomes its shorthand, if any."""
    if isinstance(config, DecoderConfig):
        config = config.shorthand or config
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, LayerAttention):
        return {"kind": value.kind, **config_to_json(value)}
    if dataclasses.is_dataclass(value):
        return config_to_json(value)
    if isinstance(value, Fraction):
        return str(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def config_from_json(kind: type, values: Any, where: str) -> Any:
    """The dataclass. Raises ValueError, beginning with `where`, for values that do not fit."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}={shorten(repr(values))}: must be an object with the fields of {kind.__name__}")
    if kind is DecoderConfig and "layers" not in values:
        return _checked(where, config_from_json(GroupedDecoder, values, where).config)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [name for name in values if name not in fields]
    required = [
        name for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if unknown or missing:
        both = (("unknown", unknown), ("missing", missing))
        faults = [f"{what} {', '.join(shorten(name, 40) for name in names[:20])}" for what, names in both if names]
        raise ValueError(f"{where}: {'; '.join(faults)} (fields of {kind.__name__})")
    hints = get_type_hints(kind)
    built = {name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    return _checked(where, partial(kind, **built))


def _checked(where: str, make: Callable[[], Any]) -> Any:
    """The result of `make`; its errors begin with `where`."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _attention(value: dict, where: str) -> Any:
    """The contract of the kind that the object names."""
    kinds = {kind.kind: kind for kind in LayerAttention.__subclasses__()}
    if value.get("kind") not in kinds:
        said = shorten(repr(value.get("kind")))
        raise ValueError(f"{where}.kind={said}: must be one of {', '.join(map(repr, kinds))}")
    fields = {name: field for name, field in value.items() if name != "kind"}
    return config_from_json(kinds[value["kind"]], fields, where)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` converted to the type of `hint`. The dataclass itself checks ranges."""
    options = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    nested = [option for option in options if dataclasses.is_dataclass(option)]
    if value is None and type(None) in options:
        return None
    if LayerAttention in nested and isinstance(value, dict):
        return _attention(value, where)
    if nested and isinstance(value, dict):
        fitting = [n for n in nested if set(value) <= {f.name for f in dataclasses.fields(n)}]  # type: ignore[arg-type]
        return config_from_json((fitting or nested)[0], value, where)  # type: ignore[arg-type]
    if any(get_origin(option) is tuple for option in options) and isinstance(value, list):
        [kind] = [get_args(option) for option in options if get_origin(option) is tuple]
        inner = kind[0] if kind else Any
        return tuple(item if inner is Any else _value(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    allowed = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    plain = tuple(option for option in options if option in (int, float, str, bool))
    if allowed and (isinstance(value, str) or not plain):  # a word, where a number may stand too
        if value not in allowed:
            raise ValueError(f"{where}={shorten(repr(value))}: must be one of {', '.join(map(repr, allowed))}")
        return value
    if float in plain and int not in plain and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        names = " or ".join(dict.fromkeys(getattr(option, "__name__", str(option)) for option in options))
        raise ValueError(f"{where}={shorten(repr(value))}: must be {names}")
    return value
