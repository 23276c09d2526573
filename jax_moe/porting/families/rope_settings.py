"""Rotary settings in config.json, by the rules of `transformers` (modeling_rope_utils): read and written."""

from typing import Any

from jax_moe.config.attention import RopeConfig, RopeKind
from jax_moe.porting.families.settings import ROPE_KINDS, Settings

WHOLE = "these families rotate whole heads"


def rope_object(settings: Settings) -> tuple[str, dict[str, Any]]:
    """The object that transformers takes, and its name; of two rope_scaling, unless it is empty."""
    given = [(name, settings.take(name, dict, {}, {})) for name in ("rope_scaling", "rope_parameters")]
    return next((each for each in given if each[1]), ("rope_parameters", {}))


def read_rope(
    settings: Settings, theta: float, max_positions: int, fraction: float | None = None,
    kinds: tuple[RopeKind, ...] = ROPE_KINDS,
) -> RopeConfig:
    """The contract of rope_parameters, or of the older rope_scaling; `theta` is the family's default, and so is
    `fraction`, the share of a head that turns: None in a family that turns whole heads; `kinds` are those it may have.

    Of two objects transformers takes rope_scaling whole, unless it is empty. What the object does not say of theta
    stands at the top level; the trained length of yarn and llama3 is taken from the top level first, that of longrope
    from the object alone. `kinds` are those that the family may have.
    """
    name, raw = rope_object(settings)
    inner = Settings(raw, settings.errors, f"{name}.")
    kind: Any = inner.choice("rope_type" if "rope_type" in raw else "type", "default", kinds)
    for level in (settings, inner) if fraction is None else ():
        level.must_be("partial_rotary_factor", 1.0, WHOLE)
    for key, value in raw.items():
        if isinstance(value, dict):
            inner.wrong(key, "absent (one object for all layers is supported)")
    base = inner.number("rope_theta", theta) if "rope_theta" in raw else settings.number("rope_theta", theta)
    config: dict[str, Any] = {"kind": kind, "theta": base, "max_positions": max_positions}
    if fraction is not None:
        outer = settings.number("partial_rotary_factor", fraction, null=1.0)
        config["fraction"] = inner.number("partial_rotary_factor", outer)
    try:
        return RopeConfig(**config, **_stretching(settings, inner, kind, max_positions))
    except ValueError as error:
        settings.errors.append(f"{name}: {error}")
        return RopeConfig()


def _stretching(settings: Settings, inner: Settings, kind: str, max_positions: int) -> dict[str, Any]:
    """What stands beside the base, by kind."""
    if kind == "default":
        return {}
    if kind == "proportional":
        return {"factor": inner.number("factor", 1.0)}
    found: dict[str, Any] = {}
    if kind in ("yarn", "llama3", "longrope"):
        top = "original_max_position_embeddings" in settings.values and kind != "longrope"
        original = (settings if top else inner).integer("original_max_position_embeddings", max_positions, least=1)
        found["original_max_positions"] = original
    required = ["factor"]
    if kind == "longrope":
        required = ["short_mscale", "long_mscale"]
        found |= {f"{name}s": inner.numbers(name) for name in ("short_factor", "long_factor")}
    if kind == "yarn":
        found |= {name: inner.number(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim")}
        found |= {
            name: inner.number(name, usual, null=usual) for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))
        }
        found["truncate"] = inner.flag("truncate", True)
        if inner.values.get("factor", 0) is None:
            return found | {"factor": max_positions / found["original_max_positions"]}
    if kind == "llama3":
        required += ["low_freq_factor", "high_freq_factor"]
    for name in required:
        if inner.values.get(name) is None:
            inner.errors.append(f"{inner.prefix}{name} is missing")
        else:
            found[name] = inner.number(name, 4.0 if name == "high_freq_factor" else 1.0)
    return found


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """rope_parameters that `read_rope` reads back."""
    written: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.fraction != 1:
        written["partial_rotary_factor"] = rope.fraction
    if rope.kind == "longrope":
        written |= {"short_factor": [*rope.short_factors], "long_factor": [*rope.long_factors]}
        written |= {"short_mscale": rope.short_mscale, "long_mscale": rope.long_mscale}
    elif rope.kind != "default":
        written["factor"] = rope.factor
    if rope.original_max_positions is not None:
        written["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "yarn":
        names = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
        written |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    if rope.kind == "llama3":
        written |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    return written
