"""Alternating timings, and the machine on which they were taken."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def alternate(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """{contestant: seconds of each call}. They take turns, so that a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(warmup + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the time of `name` divided by the time of `base` in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def machine() -> dict[str, str | int]:
    """Processor, cores in use, and versions of Python and of the installed packages that matter here."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    packages = ("jax", "flax", "torch", "transformers", "tokamax")
    versions = {name: version for name in packages if (version := _version(name))}
    return {"processor": model, "cores": cores, "python": platform.python_version(), **versions}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> dict[str, str]:
    """The device that jax uses: its kind, the platform's version, and the driver of an NVIDIA card."""
    import jax

    first, driver = jax.devices()[0], Path("/proc/driver/nvidia/version")
    about = {"device": first.device_kind, "platform": " ".join(first.client.platform_version.split())}
    return about | ({"driver": driver.read_text().splitlines()[0]} if driver.exists() else {})
