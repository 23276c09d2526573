"""config.json read with types checked: every fault is kept, so that one error names them all."""

from collections.abc import Mapping
from typing import Any

from jax_moe.config import Activation
from jax_moe.decoder_config import RopeConfig, RopeKind

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list", dict: "an object"}


class Settings:
    """A dictionary asked by name and type. What is missing or wrong is noted in `errors` and answered with a stand-in.

    null counts as absent, as in Hugging Face's own configurations.
    """

    def __init__(self, values: Mapping[str, Any], errors: list[str] | None = None, prefix: str = ""):
        self.values, self.prefix = values, prefix
        self.errors: list[str] = [] if errors is None else errors

    def _take(self, names: tuple[str, ...], kind: type, default: Any, required: bool, stand_in: Any) -> Any:
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        for name, value in found.items():
            number = kind is float and isinstance(value, int)
            if not (isinstance(value, kind) or number) or (isinstance(value, bool) and kind is not bool):
                self.errors.append(f"{self.prefix}{name}={value!r}: must be {_WORDS[kind]}")
                return stand_in
        if len({str(value) for value in found.values()}) > 1:
            self.errors.append(" and ".join(f"{self.prefix}{n}={v!r}" for n, v in found.items()) + ": must agree")
        if not found and required:
            self.errors.append(f"{self.prefix}{names[0]} is missing")
            return stand_in
        return next(iter(found.values()), default)

    def size(self, *names: str) -> int:
        """A required integer above 0, under any of these names."""
        value = self._take(names, int, None, True, 1)
        if value < 1:
            self.errors.append(f"{self.prefix}{names[0]}={value}: must be at least 1")
        return max(value, 1)

    def integer(self, name: str, default: int | None) -> Any:
        """An integer, or the default."""
        return self._take((name,), int, default, False, default)

    def number(self, name: str, default: float | None) -> Any:
        """A number, or the default."""
        found = self._take((name,), float, default, False, default)
        return None if found is None else float(found)

    def flag(self, name: str, default: bool) -> bool:
        """true or false, or the default."""
        return self._take((name,), bool, default, False, default)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, empty if absent."""
        return tuple(self._list(name, int) or ())

    def strings(self, name: str) -> list[str] | None:
        """A list of strings, or None."""
        return self._list(name, str)

    def _list(self, name: str, kind: type) -> list | None:
        found = self._take((name,), list, None, False, None)
        if found is not None and not all(isinstance(one, kind) and not isinstance(one, bool) for one in found):
            self.errors.append(f"{self.prefix}{name}={found!r}: must be a list, each {_WORDS[kind]}")
            return None
        return found

    def choice(self, name: str, default: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
        """One of the allowed strings."""
        value = self._take((name,), str, default, False, default)
        if value not in allowed:
            self.errors.append(f"{self.prefix}{name}={value!r}: must be one of {', '.join(allowed)}")
            return default
        return value

    def must_be(self, name: str, allowed: Any, why: str) -> None:
        """Notes a setting that is there and not what this project supports."""
        if self.values.get(name) is not None and self.values[name] != allowed:
            self.errors.append(f"{self.prefix}{name}={self.values[name]!r}: must be {allowed!r} or absent ({why})")

    def activation(self) -> Activation:
        """hidden_act in this project's word."""
        return ACTIVATIONS[self.choice("hidden_act", "silu", ACTIVATIONS)]

    def rope(self, theta: float, max_positions: int) -> RopeConfig:
        """rope_parameters, or the older rope_theta with rope_scaling."""
        raw = {**(self._take(("rope_parameters",), dict, {}, False, {})), **(self._take(("rope_scaling",), dict, {}, False, {}))}
        inner = Settings(raw, self.errors, "rope_parameters.")
        kind = inner.choice("rope_type", inner.choice("type", "default", ROPE_KINDS), ROPE_KINDS)
        inner.must_be("partial_rotary_factor", 1.0, "these families rotate whole heads")
        original = inner.integer("original_max_position_embeddings", max_positions)
        original = self.integer("original_max_position_embeddings", original)
        stretched = kind in ("yarn", "llama3")
        factor = inner.number("factor", None)
        if factor is None:
            if kind in ("linear", "dynamic", "llama3"):
                self.errors.append("rope_parameters.factor is missing")
            factor = max(max_positions / original, 1.0) if kind == "yarn" else 1.0
        config: dict[str, Any] = {
            "kind": kind, "factor": factor, "max_positions": max_positions,
            "theta": inner.number("rope_theta", self.number("rope_theta", theta)),
            "original_max_positions": original if stretched else None,
        }
        if kind == "yarn":
            config |= {name: inner.number(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim")}
            config |= {"beta_fast": inner.number("beta_fast", 32.0), "beta_slow": inner.number("beta_slow", 1.0)}
            config["truncate"] = inner.flag("truncate", True)
        if kind == "llama3":
            for name, usual in (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)):
                config[name] = inner.number(name, usual)
        try:
            return RopeConfig(**config)
        except ValueError as error:
            self.errors.append(f"rope_parameters: {error}")
            return RopeConfig()


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """rope_parameters that `Settings.rope` reads back."""
    written: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        written["factor"] = rope.factor
    if rope.original_max_positions is not None:
        written["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "yarn":
        names = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
        written |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    if rope.kind == "llama3":
        written |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    return written
