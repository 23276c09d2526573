"""Compiled programs kept between commands, so that a second start does not compile again."""

import hashlib
import os
import platform
import warnings
from contextlib import suppress
from pathlib import Path

import jax

LARGEST = 2**31  # bytes; the programs that were not used for the longest time make room
SHORTEST = 0.1  # seconds; what compiles faster is not kept
CPUINFO = Path("/proc/cpuinfo")


def keep_programs() -> None:
    """Lets jax keep the programs that this process compiles in a folder of the user, and take them from there.

    For commands. The folder is `jax-moe` in `$XDG_CACHE_HOME`, by default `~/.cache`, with a folder for each kind of
    processor, as jax's key of a program leaves that out. Nothing is done if the folder cannot be made, or if
    `JAX_COMPILATION_CACHE_DIR` names another.
    """
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(home) if home else Path("~/.cache").expanduser()) / "jax-moe" / f"programs-{processor()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or a home that is read-only or full
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    # an entry that is damaged, or a disk that is full: the program is compiled
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")


def processor() -> str:
    """A name of this kind of processor: the machine, and a hash of its model and features."""
    about = platform.processor()
    with suppress(OSError):
        lines = CPUINFO.read_text().split("\n\n")[0].splitlines()
        about = "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return f"{platform.machine()}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
