"""A command killed at many moments, in one process that imports once and forks for every attempt.

    python -m parity_tests.killed train|port FOLDER KILLS SEED -- ARGUMENTS

An attempt dies without a word (as by `kill -9`) some thousandths of a second after one of its changes to FOLDER: a file
opened for writing, a rename, a removal. Which one is drawn from all that an undisturbed run makes. Prints one JSON
object an attempt: the exit status (negative: the signal), and what then lay in FOLDER.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
LATEST = 0.03  # seconds after the change


def attempt(run: Callable[[], int], folder: Path, dies_at: int | None, delay: float) -> tuple[int, int]:
    """Exit status and the number of changes, of a child that dies after the change `dies_at`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            opened = event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
            if (opened or event in CHANGES) and str(arguments[0]).startswith(str(folder)):
                count += 1
                if count == dies_at:
                    signal.setitimer(signal.ITIMER_REAL, delay)  # its default action ends the process at once

        sys.addaudithook(watch)
        output = os.open(os.devnull, os.O_WRONLY)
        os.dup2(output, 1)
        status = run()
        os.write(writing, str(count).encode())
        os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with open(reading) as pipe:
        return os.waitstatus_to_exitcode(status), int(pipe.read() or 0)


def attempts(run: Callable[[bool], int], folder: Path, kills: int, seed: int, show: Callable[[int], None]) -> None:
    """An undisturbed run, then attempts until `kills` of them were killed and the last one has ended by itself."""
    status, changes = attempt(lambda: run(False), folder, None, 0)
    show(status)
    shutil.rmtree(folder)
    draw, killed, fresh = random.Random(seed), 0, True
    while killed < kills or status < 0:
        dies_at = draw.randint(1, changes) if killed < kills else None
        folder.mkdir(exist_ok=True)
        status, _ = attempt(lambda again=not fresh: run(again), folder, dies_at, draw.uniform(0.0001, LATEST))
        show(status)
        killed += status == -signal.SIGALRM
        fresh = status == 0
        if fresh and killed < kills:
            shutil.rmtree(folder)


class Adder:
    """A learner whose step is one addition, so that an attempt costs little; saved and restored as the JAX side is."""

    num_parameters, device = 12, "no device"

    def __init__(self, *_: object):
        import jax.numpy as jnp

        self.state = {"params": {"w": jnp.zeros((3, 4))}, "optimizer": ({}, {"count": jnp.zeros((), jnp.int32)})}

    def train_step(self, step: int, tokens_BT1: Any) -> float:
        (empty, counter), w = self.state["optimizer"], self.state["params"]["w"]
        self.state = {"params": {"w": w + tokens_BT1.sum() + step}, "optimizer": (empty, {"count": counter["count"] + 1})}
        return float(self.state["params"]["w"].mean())

    def evaluate(self, step: int, use: str, batches: Any) -> Any:
        from train.learner import Evaluation

        loss = self.state["params"]["w"].sum() + sum(one.sum() for one in batches)
        return Evaluation(float(loss), [0.0], [[1.0]], [0.0], [0.0])

    def save(self, folder: Path, step: int, settings: dict[str, Any]) -> None:
        from train import checkpoint

        checkpoint.save(folder, step, self.state, settings)

    def restore(self, folder: Path) -> tuple[int, dict[str, Any]]:
        from train import checkpoint

        step, settings, self.state = checkpoint.restore(folder, self.state)
        return step, settings

    def sample(self, prompt: list[int], length: int, temperature: float) -> list[int]:
        return prompt

    def write(self, folder: Path) -> None:
        import numpy as np

        from train.run_folder import write_weights

        write_weights(folder, {"w": np.asarray(self.state["params"]["w"])})


def main() -> None:
    kind, where, kills, seed, _, *arguments = sys.argv[1:]
    folder = Path(where).absolute()
    warnings.filterwarnings("ignore", message="os.fork")
    if kind == "train":
        from train import loop

        loop.make_learner = Adder  # type: ignore[assignment,misc]

        def run(again: bool) -> int:
            resumed = again and (folder / "run" / "config.json").exists()
            if again and not resumed:
                shutil.rmtree(folder / "run", ignore_errors=True)
            sys.argv = ["train.py", *arguments, "--out", str(folder / "run"), *(["--resume"] if resumed else [])]
            return loop.main()
    else:
        from jax_moe.cli import main as command

        def run(again: bool) -> int:
            return command([*arguments, str(folder / "target"), "--overwrite"])

    def show(status: int) -> None:
        print(json.dumps({"status": status, "files": digests(folder)}), flush=True)

    folder.mkdir(exist_ok=True)
    attempts(run, folder, int(kills), int(seed), show)


def digests(folder: Path) -> dict[str, str]:
    """What a user would look at: the trained model's digest, the losses, and whether a ported target is whole."""
    model, losses = folder / "run" / "model.safetensors", folder / "run" / "metrics.jsonl"
    rows = [[row["step"], row["val_loss"]] for row in map(json.loads, _lines(losses))]
    found = {path.name: "" for path in folder.iterdir()} | {"losses": str(rows)}
    if model.exists():
        found["run/model.safetensors"] = hashlib.sha256(model.read_bytes()).hexdigest()
    if (folder / "target").exists():
        found["target"] = "whole" if _whole(folder / "target") else "broken"
    return found


def _whole(target: Path) -> bool:
    """Whether an Orbax folder of ours holds every file that its config.json names, byte for byte."""
    files = json.loads((target / "config.json").read_text())["files"]
    return all(hashlib.sha256((target / name).read_bytes()).hexdigest() == digest for name, (_, digest) in files.items())


def _lines(file: Path) -> list[str]:
    text = file.read_text() if file.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    main()
