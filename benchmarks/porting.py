"""How fast does a Hugging Face checkpoint come into JAX and go back, and how much memory does that take?

    python -m benchmarks.porting [--gib 2] [--rounds 3] [--keep DIR] [--json]

Generates a Mixtral checkpoint in bf16 and then, in turn and each in a process of its own: loads it; saves it (written, read
back, on the disk), which must give every tensor again bit for bit; copies its files (shutil.copyfile, with and without
fsync); reads them. Files are in the page cache. Extra memory is the process's peak beyond what it held before and the
weights themselves, mapped files included, as a ratio to the largest stacked tensor. Ratios of processor time say what a
busy machine hides. Linux only (/proc).
"""

import argparse
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
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

import jax_moe
from benchmarks.timing import machine
from jax_moe.disk import same_bits
from jax_moe.porting.formats.shards import open_weights

NUM_EXPERTS, EXPERT_DIM, MODEL_DIM = 8, 3584, 1024
SIZES = {"vocab_size": 32000, "model_dim": MODEL_DIM, "num_heads": 16, "num_kv_heads": 4, "head_dim": 64}
SHARD_BYTES = 500_000_000
WORK = ("load", "save", "copy", "copy without fsync", "read")


def generate(folder: Path, gib: float) -> tuple[int, int]:
    """A folder of at least `gib` GiB, in as many layers as that takes. Bytes: of all weights, of the largest stacked tensor."""
    per_layer = 2 * 3 * NUM_EXPERTS * EXPERT_DIM * MODEL_DIM
    layers, experts = max(1, math.ceil(gib * 2**30 / per_layer)), NUM_EXPERTS if gib else 2
    moe = jax_moe.presets.mixtral(MODEL_DIM, EXPERT_DIM if gib else 8, experts, 2)
    config = jax_moe.DecoderConfig.grouped(num_layers=layers, moe=moe, **SIZES)  # type: ignore[arg-type]
    model = nnx.eval_shape(lambda: jax_moe.Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    generator = np.random.default_rng(0)
    filled, sizes = [], []
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        bits = generator.integers(0, 2**16, variable.shape, np.uint16)
        bits &= np.uint16(0xBFFF)  # any bits of magnitude below 2: all finite
        sizes.append(bits.nbytes)
        filled.append((keys, variable.replace(jax.device_put(bits.view(ml_dtypes.bfloat16)))))
    nnx.update(model, nnx.from_flat_state(filled))
    jax_moe.save_pretrained(model, folder, model_type="mixtral", overwrite=True, max_shard_bytes=SHARD_BYTES)
    return sum(sizes), max(sizes)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak; files that are mapped count."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measured(run: Callable[[], object]) -> dict[str, float]:
    """Seconds, and the peak of memory beyond what was held before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be reused without being seen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now
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
        # imports and the start of jax are no conversion: a tiny folder pays for them
        tiny = jax_moe.load_pretrained(folder.parent / "tiny")
        if kind == "load":
            return measured(lambda: jax_moe.load_pretrained(folder))
        jax_moe.save_pretrained(tiny, into.with_name("tiny_again"), overwrite=True)
        model = jax_moe.load_pretrained(folder)
        return measured(lambda: jax_moe.save_pretrained(model, into))
    into.mkdir()
    return measured(lambda: read(files) if kind == "read" else copy(files, into, sync=kind == "copy"))


def read(files: list[Path]) -> None:
    """Every byte, into one buffer."""
    buffer = bytearray(1 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def copy(files: list[Path], into: Path, sync: bool) -> None:
    """Every file, at the end on the disk if `sync`."""
    for file in files:
        shutil.copyfile(file, into / file.name)
        if sync:
            descriptor = os.open(into / file.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def check_same(one: Path, two: Path) -> None:
    """Stops unless both folders hold the same tensors, bit for bit."""
    with open_weights(one) as a, open_weights(two) as b:
        both = a.keys() & b.keys()
        differ = [*(a.keys() ^ b.keys()), *(name for name in both if not same_bits(a[name].read(), b[name].read()))]
    if differ:
        raise SystemExit(f"Load and save changed {len(differ)} tensors, such as {differ[0]}; nothing was timed.")


def alone(kind: str, folder: Path, into: Path) -> dict[str, float]:
    """One measurement in a process of its own, what it wrote removed."""
    command = [sys.executable, "-m", "benchmarks.porting", "--work", kind, str(folder), str(into)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed: {done.stderr.strip()}")
    if kind == "save":
        check_same(folder, into)
    shutil.rmtree(into, ignore_errors=True)
    return json.loads(done.stdout)


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
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    seconds = {kind: statistics.median(one["seconds"] for one in results) for kind, results in found.items()}
    ratios = {
        f"{kind}_over_{base.replace(' ', '_')}": statistics.median(
            one["seconds"] / other["seconds"] for one, other in zip(found[kind], found[base], strict=True))
        for kind in ("load", "save") for base in ("copy", "copy without fsync", "read")
    }
    ratios |= {
        f"{kind}_cpu_over_copy_cpu": statistics.median(
            one["cpu_seconds"] / other["cpu_seconds"] for one, other in zip(found[kind], found["copy"], strict=True))
        for kind in ("load", "save")
    }
    peaks = {kind: statistics.median(one["peak"] for one in found[kind]) for kind in ("load", "save")}
    return {
        "question": "a Mixtral checkpoint into JAX and back, files in the page cache", "rounds": rounds,
        "gib": size / 2**30, "files": len(list(source.glob("*.safetensors"))), "largest_stacked_tensor_gib": largest / 2**30,
        **{f"{kind.replace(' ', '_')}_gb_per_second": size / one / 1e9 for kind, one in seconds.items()}, **ratios,
        "load_extra_over_largest": (peaks["load"] - weights) / largest, "save_extra_over_largest": peaks["save"] / largest,
        "bit_identical": True, "load_average": os.getloadavg()[0], **machine(),
    }


def main() -> None:
    """Prints one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2, help="size of the checkpoint in GiB, at least (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--keep", type=Path, help="a folder to work in and to leave the checkpoint in (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        kind, folder, into = arguments.work
        print(json.dumps(work(kind, Path(folder), Path(into))))
        return
    with tempfile.TemporaryDirectory(prefix="porting.") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        needed = int(2.2 * (arguments.gib + 0.5) * 2**30)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise SystemExit(f"{folder}: needs {needed:,} bytes, {free:,} are free")
        result = measure(folder, arguments.gib, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:34} {value:.3g}" if isinstance(value, float) else f"{name:34} {value}")


if __name__ == "__main__":
    main()
