"""Alternating timings, and the machine on which they were taken."""

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


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
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "triton", "tokamax")
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


def product_rate(dtype: str, side: int) -> float:
    """FLOPs a second of the product of two square matrices, the fastest of ten."""
    import jax
    import jax.numpy as jnp

    square = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    product = jax.jit(jnp.matmul)
    seconds = alternate({"product": lambda: jax.block_until_ready(product(square, square))}, rounds=10, warmup=2)
    return 2 * side**3 / min(seconds["product"])


def about_run() -> dict[str, Any]:
    """Date, device, machine, XLA_FLAGS, and the revision of the sources where git knows it."""
    git = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = None
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "device": device(),
        "machine": machine(), "xla_flags": os.environ.get("XLA_FLAGS", ""), "revision": revision,
    }


def new_file(about: dict[str, Any], folder: Path, what: str = "") -> Path:
    """`<date>-<device><what>.json` in the folder, which is made; with a number if that name is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"]["device"].lower()).strip("-")
    stem, number = f"{about['date'][:10]}-{name}{what}", 1
    while (path := folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")).exists():
        number += 1
    return path
