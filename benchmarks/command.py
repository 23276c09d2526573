"""The benchmarks' command lines: the options of each are a dataclass, which tyro reads."""

from collections.abc import Iterable
from typing import TypeVar

import tyro

from jax_moe.arguments import registry
from jax_moe.config.checks import require

Options = TypeVar("Options")


def read_options(kind: type[Options], module: str, about: str | None, arguments: list[str] | None = None) -> Options:
    """The options of `python -m module`. If they are wrong, exits with status 2 and the reason on stderr."""
    return tyro.cli(
        kind, prog=f"python -m {module}", description=about, args=arguments, config=(tyro.conf.FlagCreatePairsOff,),
        registry=registry,
    )


def read_names(option: str, text: str | None, allowed: Iterable[str]) -> set[str] | None:
    """The names in a comma-separated option; None if it is left out. Raises ValueError for an unknown name."""
    if text is None:
        return None
    chosen, known = {name.strip() for name in text.split(",")}, list(allowed)
    for name in sorted(chosen):
        require(name in known, option, name, f"one of {', '.join(known)}")
    return chosen
