"""config.json read with types checked: every fault is kept, so that one error names them all."""

from collections.abc import Mapping
from typing import Any

from jax_moe.config.attention import RopeKind
from jax_moe.config.checks import is_number, shorten
from jax_moe.config.moe import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
_WORDS = {
    int: "an integer", float: "a finite number", bool: "true or false", str: "a string", list: "a list",
    dict: "an object",
}


REFUSED: Any = object()  # the default answer to null


class Settings:
    """A dictionary asked by name and type. What is missing or wrong is noted in `errors` and answered with a stand-in.

    null is no value: it counts as missing where a value is required, and is refused where transformers refuses it,
    unless `null` says what it means.
    """

    def __init__(self, values: Mapping[str, Any], errors: list[str] | None = None, prefix: str = ""):
        self.values, self.prefix = values, prefix
        self.errors: list[str] = [] if errors is None else errors

    def wrong(self, name: str, allowed: str, value: Any = None) -> None:
        """Notes that a value is not what is allowed: that of the setting, or what was read in its place."""
        value = self.values.get(name) if value is None else value
        self.errors.append(f"{self.prefix}{name}={shorten(repr(value))}: must be {allowed}")

    def take(self, name: str, kind: type, default: Any, null: Any = REFUSED) -> Any:
        """The value of that type; the default where it is absent or wrong."""
        if name not in self.values:
            return default
        value = self.values[name]
        if value is None and null is not REFUSED:
            return null
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        fits = is_number(value) if kind is float else fits
        if not fits:
            self.wrong(name, _WORDS[kind])
        return value if fits else default

    def size(self, *names: str) -> int:
        """A required integer above 0, under any of these names."""
        found = {name: self.take(name, int, 1) for name in names if self.values.get(name) is not None}
        if not found:
            self.errors.append(f"{self.prefix}{names[0]} is missing")
            return 1
        if len(set(found.values())) > 1:
            self.errors.append(" and ".join(f"{self.prefix}{n}={v!r}" for n, v in found.items()) + ": must agree")
        name, value = next(iter(found.items()))
        if value < 1:
            self.wrong(name, "at least 1")
        return max(value, 1)

    def integer(self, name: str, default: int | None, *, null: Any = REFUSED, least: int | None = None) -> Any:
        """An integer (of at least `least`), or the default; null is allowed where that is None."""
        value = self.take(name, int, default, None if default is None else null)
        if least is not None and value is not None and value < least:
            self.wrong(name, f"an integer of at least {least}")
            return default
        return value

    def number(self, name: str, default: float | None, *, null: Any = REFUSED) -> Any:
        """A finite number, or the default; null is allowed where that is None."""
        found = self.take(name, float, default, None if default is None else null)
        return None if found is None else float(found)

    def flag(self, name: str, default: bool) -> bool:
        """true or false, or the default."""
        return self.take(name, bool, default)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, empty if absent or null."""
        return tuple(self._list(name, int) or ())

    def strings(self, name: str) -> list[str] | None:
        """A list of strings, or None."""
        return self._list(name, str)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A required list of finite numbers."""
        found = self.take(name, list, None)
        if name not in self.values:
            self.errors.append(f"{self.prefix}{name} is missing")
        elif found is not None and not all(map(is_number, found)):
            self.wrong(name, "a list, each a finite number")
        return tuple(map(float, filter(is_number, found or ())))

    def _list(self, name: str, kind: type) -> list | None:
        found = self.take(name, list, None, None)
        if found is not None and not all(isinstance(value, kind) and not isinstance(value, bool) for value in found):
            self.wrong(name, f"a list, each {_WORDS[kind]}")
            return None
        return found

    def choice(self, name: str, default: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
        """One of the allowed strings."""
        value = self.take(name, str, default)
        if value not in allowed:
            self.wrong(name, f"one of {', '.join(allowed)}")
            return default
        return value

    def must_be(self, name: str, allowed: Any, why: str) -> None:
        """Notes a setting that is there and not what this project supports."""
        value = self.values.get(name)
        if value is not None and (value != allowed or isinstance(value, bool) != isinstance(allowed, bool)):
            self.wrong(name, f"{allowed!r} or absent ({why})")

    def activation(self) -> Activation:
        """hidden_act in this project's word."""
        return ACTIVATIONS[self.choice("hidden_act", "silu", ACTIVATIONS)]
