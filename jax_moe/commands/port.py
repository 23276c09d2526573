"""`jax-moe port`: a checkpoint from one form into another."""

from pathlib import Path

import jax

from jax_moe.cli import Port
from jax_moe.commands.common import summary, with_characters
from jax_moe.porting.checkpoint import is_folder, load, save
from jax_moe.porting.files import SUFFIXES, check_target, write_state


def port(command: Port) -> int:
    """Reads SRC, writes DST, says what was written."""
    to_file = command.dst.suffix in SUFFIXES
    check_target(command.dst, command.overwrite, Path.is_file if to_file else is_folder)
    if not to_file and command.dst.suffix and not command.dst.is_dir():
        raise ValueError(f"{command.dst}: must end in one of {', '.join(SUFFIXES)}, or in nothing for a folder")
    with jax.enable_x64(True):  # moves bits, computes nothing; float64 files need it
        checkpoint = load(command.src, command.choices, allow_nonfinite=command.allow_nonfinite, dtype=command.dtype)
        checkpoint = with_characters(checkpoint, command.text)
        if to_file:
            write_state(command.dst, checkpoint.state(), overwrite=command.overwrite)
        else:
            save(checkpoint, command.dst, overwrite=command.overwrite)
    print(f"wrote {command.dst}: {summary(checkpoint)}, read back bit for bit")
    return 0
