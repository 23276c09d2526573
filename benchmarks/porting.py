"""How fast does a Hugging Face checkpoint come into JAX and go back, and how much memory does that take?

    python -m benchmarks.porting [--gib 2] [--rounds 3] [--keep DIR] [--json]

Generates a Mixtral checkpoint in bf16. Then, in turn and each in a process of its own, it is loaded; saved (written,
read back, synced to disk), which must reproduce every tensor bit for bit; its files are copied (shutil.copyfile, with
and without fsync) and read. Files are in the page cache. Extra memory is the process's peak beyond what it held before
and beyond the weights, mapped files included, as a ratio to the largest stacked tensor. Ratios of processor time are
printed too: a busy machine does not change them. Linux only (/proc).
"""

import ctypes
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

import jax_moe
from benchmarks.command import read_options
from benchmarks.timing import machine
from jax_moe.config.checks import check_positive_ints, require
from jax_moe.disk import same_bits
from jax_moe.porting.formats.shards import open_weights

NUM_EXPERTS, EXPERT_DIM, MODEL_DIM = 8, 3584, 1024
SIZES = {"vocab_size": 32000, "model_dim": MODEL_DIM, "num_heads": 16, "num_kv_heads": 4, "head_dim": 64}
SHARD_BYTES = 500_000_000
WORK = ("load", "save", "copy", "copy without fsync", "read")
ALONE = "import sys; from benchmarks.porting import main_alone; main_alone(*sys.argv[1:])"


@dataclass(frozen=True)
class Options:
    """How large, how often, and where."""

    gib: float = 2
    """Least size of the checkpoint in GiB."""
    rounds: int = 3
    """Measurements of each kind of work."""
    keep: Path | None = None
    """Work in this folder and leave the checkpoint there; by default in a temporary folder."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)
        require(0 < self.gib < math.inf, "gib", self.gib, "above 0 and finite")


def generate(folder: Path, gib: float) -> tuple[int, int]:
    """Writes a folder of at least `gib` GiB; (bytes of all weights, bytes of the largest stacked tensor)."""
    per_layer = 2 * 3 * NUM_EXPERTS * EXPERT_DIM * MODEL_DIM
    layers, experts = max(1, math.ceil(gib * 2**30 / per_layer)), NUM_EXPERTS if gib else 2
    moe = jax_moe.presets.mixtral(MODEL_DIM, EXPERT_DIM if gib else 8, experts, 2)
    config = jax_moe.DecoderConfig.grouped(num_layers=layers, moe=moe, **SIZES)  # type: ignore[arg-type]
    model = nnx.eval_shape(lambda: jax_moe.Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    generator = np.random.default_rng(0)
    filled, sizes = [], []
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        bits = generator.integers(0, 2**16, variable.shape, np.uint16)
        bits &= np.uint16(0xBFFF)  # all magnitudes below 2, so that all numbers are finite
        sizes.append(bits.nbytes)
        filled.append((keys, variable.replace(jax.device_put(bits.view(ml_dtypes.bfloat16)))))
    nnx.update(model, nnx.from_flat_state(filled))
    jax_moe.save_pretrained(model, folder, model_type="mixtral", overwrite=True, max_shard_bytes=SHARD_BYTES)
    return sum(sizes), max(sizes)


def resident(field: str) -> int:
    """Bytes of memory of this process, mapped files included. `field`: VmRSS is now, VmHWM the peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measured(run: Callable[[], object]) -> dict[str, float]:
    """Seconds, processor seconds, and peak memory in bytes beyond what the process held before."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not returned would be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start, worked = resident("VmRSS"), time.perf_counter(), time.process_time()
    kept = run()
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    peak = resident("VmHWM") - before
    del kept
    return {"seconds": seconds, "cpu_seconds": worked, "peak": peak}


def work(kind: str, folder: Path, into: Path) -> dict[str, float]:
    """One measurement in this process."""
    files = sorted(folder.glob("*.safetensors"))
    if kind in ("load", "save"):
        # a tiny folder first, so that imports and the start of jax are not measured
        tiny = jax_moe.load_pretrained(folder.parent / "tiny")
        if kind == "load":
            return measured(lambda: jax_moe.load_pretrained(folder))
        jax_moe.save_pretrained(tiny, into.with_name("tiny_again"), overwrite=True)
        model = jax_moe.load_pretrained(folder)
        return measured(lambda: jax_moe.save_pretrained(model, into))
    into.mkdir()
    return measured(lambda: read(files) if kind == "read" else copy(files, into, sync=kind == "copy"))


def read(files: list[Path]) -> None:
    """Reads every byte into one buffer."""
    buffer = bytearray(1 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def copy(files: list[Path], into: Path, sync: bool) -> None:
    """Copies every file; with `sync` each is synced to disk."""
    for file in files:
        shutil.copyfile(file, into / file.name)
        if sync:
            descriptor = os.open(into / file.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def check_same(source: Path, saved: Path) -> None:
    """Exits unless both folders hold the same tensors, bit for bit."""
    a, b = open_weights(source), open_weights(saved)
    both = a.keys() & b.keys()
    differ = [*(a.keys() ^ b.keys()), *(name for name in both if not same_bits(a[name].read(), b[name].read()))]
    if differ:
        raise SystemExit(f"Load and save changed {len(differ)} tensors, such as {differ[0]}; nothing was timed.")


def alone(kind: str, folder: Path, into: Path) -> dict[str, float]:
    """One measurement in a process of its own; what it wrote is removed."""
    command = [sys.executable, "-c", ALONE, kind, str(folder), str(into)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed: {done.stderr.strip()}")
    if kind == "save":
        check_same(folder, into)
    shutil.rmtree(into, ignore_errors=True)
    return json.loads(done.stdout)


def main_alone(kind: str, folder: str, into: str) -> None:
    """The process of one measurement; prints it as JSON."""
    print(json.dumps(work(kind, Path(folder), Path(into))))


def measure(folder: Path, gib: float, rounds: int) -> dict:
    """The medians, their ratios and the machine."""
    source, into = folder / "source", folder / "again"
    weights, largest = generate(source, gib)
    generate(folder / "tiny", 0)
    os.sync()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in WORK}
    for i in range(rounds + 1):
        for kind in WORK:
            result = alone(kind, source, into)
            if i:  # the first round brings the files into the page cache
                found[kind].append(result)
    files = list(source.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    return {
        "question": "a Mixtral checkpoint into JAX and back, files in the page cache", "rounds": rounds,
        "gib": size / 2**30, "files": len(files), "largest_stacked_tensor_gib": largest / 2**30,
        **summary(found, size, weights, largest),
        "bit_identical": True, "load_average": os.getloadavg()[0], **machine(),
    }


def summary(found: dict[str, list[dict[str, float]]], size: int, weights: int, largest: int) -> dict[str, float]:
    """Rates in GB/s, ratios of loading and saving to copying and reading, and extra memory."""
    def middle(kind: str, what: str) -> float:
        return statistics.median(result[what] for result in found[kind])

    def over(kind: str, base: str, what: str) -> float:
        return statistics.median(a[what] / b[what] for a, b in zip(found[kind], found[base], strict=True))

    rates = {f"{kind.replace(' ', '_')}_gb_per_second": size / middle(kind, "seconds") / 1e9 for kind in found}
    ratios = {
        f"{kind}_over_{base.replace(' ', '_')}": over(kind, base, "seconds")
        for kind in ("load", "save") for base in ("copy", "copy without fsync", "read")
    }
    ratios |= {f"{kind}_cpu_over_copy_cpu": over(kind, "copy", "cpu_seconds") for kind in ("load", "save")}
    return {
        **rates, **ratios, "load_extra_over_largest": (middle("load", "peak") - weights) / largest,
        "save_extra_over_largest": middle("save", "peak") / largest,
    }


def main() -> None:
    """Prints one table, or JSON."""
    options = read_options(Options, "benchmarks.porting", __doc__)
    with tempfile.TemporaryDirectory(prefix="porting.") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        needed = int(2.2 * (options.gib + 0.5) * 2**30)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise SystemExit(f"{folder}: needs {needed:,} bytes, {free:,} are free")
        result = measure(folder, options.gib, options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:34} {value:.3g}" if isinstance(value, float) else f"{name:34} {value}")


if __name__ == "__main__":
    main()
