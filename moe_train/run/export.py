"""The trained model read back from the run's folder by one process, and written as a folder of its own.

No process puts the arrays of the mesh together: from a checkpoint the weights and one stacked array are in memory, from
the folder of a finished fine-tuning run one tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from jax_moe.porting.checkpoint import load_found, save
from jax_moe.porting.convert import port_decoder
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.open import open_path
from jax_moe.porting.formats.resumable import Advance
from jax_moe.porting.formats.run_folder import CHECKPOINTS, PRETRAINED
from jax_moe.porting.pretrained import MAX_SHARD_BYTES
from moe_train.run.folder import saved_steps, write_weights


def export(run: Path, target: Path) -> None:
    """Writes the run's newest weights as `jax-moe port RUN TARGET` does, whole or not at all. Raises OSError."""
    with _kept_in(run, f"`jax-moe port {run} {target}` writes it"):
        target = target.resolve()
        if target.exists():
            target.rmdir()  # it was empty when the run began
        found = open_path(run)
        if found.decoder:
            _write_decoder(found, target)
        else:
            save(load_found(found), target)


def write_newest(run: Path) -> None:
    """Writes the newest checkpoint's model into the run's folder, as at the end of a run. Raises OSError."""
    with _kept_in(run, "--resume writes it"):
        found = open_path(run / CHECKPOINTS / str(saved_steps(run)[-1]))
        if found.decoder:
            _write_decoder(found, run / PRETRAINED, overwrite=True)
        else:
            write_weights(run, load_found(found).state())


def _write_decoder(found: Found, target: Path, overwrite: bool = False) -> None:
    with jax.enable_x64(True):  # so that float64 files keep their dtype; nothing is computed
        port_decoder(
            found, target, "hf", dtype=None, max_shard_bytes=MAX_SHARD_BYTES, overwrite=overwrite,
            allow_nonfinite=False, progress=_silent, say=lambda line: None,
        )


@contextmanager
def _kept_in(run: Path, again: str) -> Iterator[None]:
    """Errors become one line: not a wrong request, and nothing is lost."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise OSError(f"the model is in {run / CHECKPOINTS} but could not be written: {error}; {again}") from None


@contextmanager
def _silent(what: str, total: int) -> Iterator[Advance]:
    yield lambda size: None
