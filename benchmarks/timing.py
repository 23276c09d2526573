"""Alternating timings, the machine they were taken on, and what the commands that take them have in common."""

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn


def alternate(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each call, the contestants taking turns so that a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(warmup + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio of one contestant to another in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def machine() -> dict[str, str | int]:
    """Processor, cores in use and versions of what is installed."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = {name: version for name in ("jax", "flax", "torch", "transformers", "tokamax") if (version := _version(name))}
    return {"processor": model, "cores": cores, "python": platform.python_version(), **versions}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> dict[str, str]:
    """What jax runs on: its kind, the platform's version, and the driver of an NVIDIA card."""
    import jax

    first, driver = jax.devices()[0], Path("/proc/driver/nvidia/version")
    about = {"device": first.device_kind, "platform": " ".join(first.client.platform_version.split())}
    return about | ({"driver": driver.read_text().splitlines()[0]} if driver.exists() else {})


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with exit status 2."""

    def __init__(self, module: str, about: str | None):
        super().__init__(prog=f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """A count on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 1")
    return int(text)


def one_of(names: Any) -> Callable[[str], set[str]]:
    """Reads names separated by commas, all of them in `names`."""

    def read(text: str) -> set[str]:
        chosen = {name.strip() for name in text.split(",")}
        if unknown := sorted(chosen - set(names)):
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: must be of {', '.join(names)}")
        return chosen

    return read
