"""The benchmarks' command lines: the options of each are a dataclass, which tyro reads."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

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


def use_device(name: str | None) -> None:
    """Makes jax use this device, if it finds it; None: what it finds. To be called before jax looks for devices.

    Raises ValueError if jax finds another device.
    """
    import jax

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # jax and torch share one GPU
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
    require(name in (None, jax.default_backend()), "device", name, f"{jax.default_backend()}, which jax finds here")


def begin(device: str | None, dtype: str | None, rounds: int) -> dict[str, Any]:
    """What a benchmark of kernels saves of itself, the rate of one large product measured first; results are empty.

    Without a dtype bfloat16 on a GPU, else float32. Ends the process with status 2 if jax has no such device.
    """
    import jax

    from benchmarks.timing import about_run, product_rate

    try:
        use_device(device)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    backend = jax.default_backend()
    dtype = dtype or ("bfloat16" if backend == "gpu" else "float32")
    rate = product_rate(dtype, 2048 if backend == "cpu" else 8192)
    return about_run() | {"dtype": dtype, "rounds": rounds, "product_rate": rate, "results": []}
