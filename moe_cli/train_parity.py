"""`jax-moe parity --train`: compares a whole training run in both frameworks."""

from pathlib import Path
from typing import Any

from jax_moe.config.checks import require
from jax_moe.disk import check_target
from jax_moe.porting.formats.open import open_path
from jax_moe.porting.torch_tensors import import_torch
from moe_cli.arguments import Parity
from moe_cli.common import say_assumed, say_note
from moe_cli.parity import POSITIONS, as_hf_folder, read_weights
from moe_parity.memory import check_memory

WIDEST = 8  # bytes of a float64, the wider of the two dtypes


def train_parity(command: Parity) -> int:
    """Prints the result of the runs; returns 1 if they drift apart faster than rounding explains."""
    _check(command)
    import_torch("parity")
    from moe_parity.training.runs import describe, train_checkpoint, train_folder
    from moe_parity.training.settings import TrainSettings

    assert command.train is not None
    given: dict[str, Any] = {
        "steps": command.train, "batch_size": command.batch_size, "seed": command.seed,
        "learning_rate": command.learning_rate, "final_learning_rate": command.learning_rate / 10,
    }
    found = open_path(command.path, command.choices)
    name = found.family.name
    if found.decoder:
        with as_hf_folder(found, WIDEST, "training") as folder:
            settings = TrainSettings(**given, num_tokens=command.num_tokens or POSITIONS)
            runs = train_folder(folder.place, settings)
    else:
        checkpoint = read_weights(found)
        sizes = [value.size for value in checkpoint.weights.values()]
        allowed = "a makeMoE language model or a Hugging Face folder, which can be trained"
        require(checkpoint.of_characters, "path", str(command.path), allowed)
        check_memory(sum(sizes), WIDEST, 0, "training")
        settings = TrainSettings(**given, num_tokens=command.num_tokens or checkpoint.config.block_size)
        runs = train_checkpoint(checkpoint, settings)
        say_note(found)
        say_assumed(found)
    title = f"{name}: {settings.steps} steps of AdamW in both frameworks"
    print("\n".join([title, *(line for each in runs for line in describe(each))]))
    if command.plot is not None:
        from moe_parity.pages.plots import write_picture

        write_picture(command.plot, runs, title)
        print(f"wrote {command.plot}")
    return 0 if all(each.passed for each in runs) else 1


def _check(command: Parity) -> None:
    """Checks the options before anything is loaded."""
    for name in ("tokens", "html"):
        require(getattr(command, name) is None, name, str(getattr(command, name)), "left out with --train")
    for name, usual in (("grads", False), ("json", False), ("explain", False), ("replay", True), ("dtype", "float32")):
        value = getattr(command, name)
        require(value == usual, name, value, "left out with --train, which runs in float64 and in float32")
    for name, least in (("train", 1), ("batch_size", 1), ("num_tokens", 2)):
        value = getattr(command, name)
        require(value is None or value >= least, name, value, f"at least {least}")
    require(0 < command.learning_rate < float("inf"), "learning_rate", command.learning_rate, "above 0 and finite")
    if command.plot is not None:
        require(command.plot.suffix == ".png", "plot", str(command.plot), "the name of a .png")
        check_target(command.plot, True, Path.is_file)
