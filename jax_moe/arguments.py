"""How every command line writes a number that may be left out: `none`."""

from typing import Any, Literal

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

NONE: Literal["none"] = "none"
# What `none` is in Python for a type, and how its default None is shown: a missing setting is as published.
KINDS: dict[Any, tuple[str | None, str]] = {
    float | None: (None, NONE),
    float | Literal["none"] | None: (NONE, "as published"),
}
registry = ConstructorRegistry()


@registry.primitive_rule
def number_or_none(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """For `tyro.cli(registry=registry)`: a number, or `none` in any case."""
    if type_info.type not in KINDS:
        return None
    nothing, default = KINDS[type_info.type]

    def read(words: list[str]) -> Any:
        try:
            return nothing if words[0].lower() == NONE else float(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r}: must be a number, or {NONE}") from None

    return PrimitiveConstructorSpec(
        nargs=1, metavar=f"FLOAT|{NONE}", instance_from_str=read,
        is_instance=lambda value: value in (None, nothing) or isinstance(value, float),
        str_from_instance=lambda value: [default if value is None else str(value)],
    )
