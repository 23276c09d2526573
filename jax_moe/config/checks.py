"""Checks of settings: each raises ValueError with field, value and what is allowed."""

import dataclasses
import math
from typing import Literal, TypeGuard, get_args, get_origin

LEAST, MOST = 1e-30, 1e30  # bounds of a setting above 0: fp32 holds it and its product with ordinary numbers
MAX_WORDS = 120  # characters of foreign text in a message
LONGEST_VALUE = 1000  # characters of a value, which may be a path
MOST_LAYERS = 10_000


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises ValueError "name=value: must be allowed" unless `holds`; of a very long value its ends."""
    if not holds:
        said = repr(value)
        said = said if len(said) <= LONGEST_VALUE else shorten(said)
        raise ValueError(f"{name}={said}: must be {allowed}")


def check_literals(config: object) -> None:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if get_origin(field.type) is Literal:
            allowed, value = get_args(field.type), getattr(config, field.name)
            require(value in allowed, field.name, value, "one of " + ", ".join(map(repr, allowed)))


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive_ints(**values: object) -> None:
    for name, value in values.items():
        require(is_int(value) and value >= 1, name, value, "an integer of at least 1")  # type: ignore[operator]


def check_depth(**layers: object) -> None:
    """Raises ValueError for a number of layers that no model has: lists of that length are made."""
    check_positive_ints(**layers)
    for name, value in layers.items():
        require(value <= MOST_LAYERS, name, value, f"at most {MOST_LAYERS:,}")  # type: ignore[operator]


def is_number(value: object) -> TypeGuard[float]:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a double
        return False


def check_rates(**values: float) -> None:
    for name, value in values.items():
        require(is_number(value) and 0 <= value < 1, name, value, "a number of at least 0 and below 1")


def check_above_zero(**values: float) -> None:
    for name, value in values.items():
        require(is_number(value) and value > 0, name, value, "a number above 0")


def check_flags(config: object, *names: str) -> None:
    for name in names:
        require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")


def check_within(least: float, optional: bool = False, **values: object) -> None:
    for name, value in values.items():
        allowed = f"{'None or ' if optional else ''}a number of {least:g} to {MOST:g}"
        holds = (optional and value is None) or (is_number(value) and least <= value <= MOST)
        require(holds, name, value, allowed)


def shorten(value: object, most: int = MAX_WORDS) -> str:
    """The text of a value on one line, with "..." for the middle of a text longer than `most` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"
