"""`jax-moe port` of a training checkpoint: weights and the optimizer's state."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jax_moe.config.checks import require
from jax_moe.disk import check_target
from jax_moe.porting.formats.own_folder import is_folder
from jax_moe.porting.formats.state_file import PT_SUFFIXES
from jax_moe.porting.optimizer.torch_file import optimizer_beside, read_decoder_optimizer
from jax_moe.porting.training_files import read_training, write_training_file, write_training_folder
from moe_cli.arguments import Form, Port
from moe_cli.common import say, say_assumed, summary, with_characters


def port_training(command: Port) -> int:
    """Reads SRC, writes DST, says what was written and what was left out."""
    to_file = command.to == "torch" or (command.to == "auto" and bool(command.dst.suffix) and not command.dst.is_dir())
    require(command.to in ("auto", "torch", "folder"), "to", command.to, "torch or folder for weights with an optimizer's state")
    require(command.dtype is None, "dtype", command.dtype, "left out for weights with an optimizer's state")
    fits = not to_file or command.dst.suffix in PT_SUFFIXES
    require(fits, "dst", str(command.dst), f"a folder, or end in {', '.join(PT_SUFFIXES)}: it holds an optimizer's state")
    check_target(command.dst, command.overwrite, Path.is_file if to_file else is_folder)
    training = read_training(command.src, command.choices, allow_nonfinite=command.allow_nonfinite)
    training = dataclasses.replace(training, checkpoint=with_characters(training.checkpoint, command.text))
    (write_training_file if to_file else write_training_folder)(training, command.dst, command.overwrite)
    say_assumed(command.src, training.checkpoint)
    if training.left_out:
        say(f"left out, for it is not plain values: {', '.join(training.left_out)}")
    print(f"wrote {command.dst}: {summary(training.checkpoint)}, {training.optimizer.in_words()}, read back bit for bit")
    return 0


def optimizer_of_decoder(command: Port, to: Form) -> tuple[list[str], Callable[[Path], None]]:
    """What is said of the optimizer's state beside a Hugging Face model, and what writes it into the new folder; or nothing."""
    file = optimizer_beside(command.src)
    if file is None:
        return [], lambda part: None
    allowed = f"left out for weights with an optimizer's state; move {file} away to convert the weights alone"
    require(command.dtype is None, "dtype", command.dtype, allowed)
    optimizer, write = read_decoder_optimizer(command.src)
    return [optimizer.in_words()], lambda part: write(part, to)


def say_what_a_run_keeps(source: Path) -> None:
    """A run of train.py has its optimizer's state in checkpoints of its own."""
    if (source / "checkpoints").is_dir():
        say(f"left out: the optimizer's state in {source / 'checkpoints'}, which train.py --resume reads")
