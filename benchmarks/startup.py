"""How long does a command take to its first output, and a training run to its first step?

    python -m benchmarks.startup [--rounds 3] [--json]

Whole processes: `jax-moe --help`, `jax-moe inspect` of a config.json, `train.py --help`, and a run of the default model
until its first step is made, with an empty folder of compiled programs and again with what the first left there.
Medians of the rounds, each of which starts with an empty folder.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import read_options
from benchmarks.timing import machine
from jax_moe.config.checks import check_positive_ints

ROOT = Path(__file__).parents[1]
JAX_MOE = [sys.executable, "-c", "import sys; from moe_cli.main import main; sys.exit(main())"]
TRAIN = [sys.executable, str(ROOT / "train" / "train.py")]
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "sliding_window": None, "hidden_act": "silu", "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Options:
    """How often."""

    rounds: int = 3
    """Starts of each command."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_positive_ints(rounds=self.rounds)


def seconds_until(command: list[str], home: Path, line: str | None = None) -> float:
    """Seconds until the command prints a line that begins so, by default until its end. Exits if it fails."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    start, found = time.perf_counter(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for printed in process.stdout:
            if line is not None and found is None and printed.startswith(line):
                found = time.perf_counter() - start
    ended = time.perf_counter() - start
    if process.returncode or (line is not None and found is None):
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}; nothing was timed.")
    return ended if found is None else found


def measure() -> dict[str, float]:
    """{what: seconds} of one round."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        (home / "config.json").write_text(json.dumps(MIXTRAL))
        once = ["--steps", "1", "--eval-batches", "1", "--sample-length", "1", "--out"]
        return {
            "jax-moe --help": seconds_until([*JAX_MOE, "--help"], home),
            "jax-moe inspect config.json": seconds_until([*JAX_MOE, "inspect", str(home / "config.json")], home),
            "train.py --help": seconds_until([*TRAIN, "--help"], home),
            "train.py, first step, first start": seconds_until([*TRAIN, *once, str(home / "first")], home, "step 1:"),
            "train.py, first step, second start": seconds_until([*TRAIN, *once, str(home / "second")], home, "step 1:"),
        }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = read_options(Options, "benchmarks.startup", __doc__, arguments)
    rounds = [measure() for _ in range(options.rounds)]
    seconds = {what: statistics.median(each[what] for each in rounds) for what in rounds[0]}
    if options.json:
        print(json.dumps({"machine": machine(), "seconds": seconds}, indent=1))
        return
    for what, median in seconds.items():
        print(f"{what:36}{median:8.2f} s")
    print(machine())


if __name__ == "__main__":
    main()
