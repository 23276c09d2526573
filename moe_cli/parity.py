"""`jax-moe parity`: compares a checkpoint in both frameworks."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from jax_moe.config.checks import require
from jax_moe.porting.checkpoint import Checkpoint, load_found
from jax_moe.porting.convert import port_decoder
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.open import open_path
from jax_moe.porting.pretrained import MAX_SHARD_BYTES
from moe_cli.arguments import Parity
from moe_cli.common import check_page_target, progress, say, say_assumed, say_note, write_page
from moe_cli.layers import compare_layers, opened
from moe_parity.batch import check_tokens, random_tokens, random_vectors, read_tokens, read_vectors
from moe_parity.memory import Work, check_memory
from moe_parity.report import Report, print_table

POSITIONS = 16  # of a random batch, if the model has no block size


def parity(command: Parity) -> int:
    """Prints the report; returns 1 if anything is beyond tolerance."""
    found = opened(command.path, command.layers, command.choices)
    if isinstance(found, tuple):
        _check(command, 1)
        require(command.html is None, "html", str(command.html), "left out with layers")
        return compare_layers(command, *found)
    _check(command, 2 if found.decoder else 1)  # a decoder's loss needs a next token
    report = _against_transformers(command, found) if found.decoder else _against_torch_ref(command, found)
    if found.run is not None:
        say(found.run.in_words())
    if command.html is not None:
        _write_page(command.html, report)
    if command.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_table(report)
        if not report.passed and not command.explain:
            print("--explain tries the known conventions: renormalisation, epsilons, gate and up exchanged, and others")
        if command.html is not None:
            print(f"wrote {command.html}")
    return 0 if report.passed else 1


def _check(command: Parity, least: int) -> None:
    """Checks the options before anything is loaded; a batch needs at least `least` positions."""
    require(command.batch_size >= 1, "batch_size", command.batch_size, "at least 1")
    require(command.plot is None, "plot", str(command.plot), "left out without --train: --html has the plots")
    fits = command.num_tokens is None or command.num_tokens >= least
    require(fits, "num_tokens", command.num_tokens, f"at least {least}")
    if command.tokens is not None:
        require(command.num_tokens is None, "num_tokens", command.num_tokens, "left out with --tokens")
    if command.html is not None:
        check_page_target(command.html)


def _write_page(path: Path, report: Report) -> None:
    from moe_parity.pages.html import page

    write_page(path, page([report]))


def _against_torch_ref(command: Parity, found: Found) -> Report:
    from moe_parity.compare import compare_checkpoint

    checkpoint = read_weights(found)
    weights = checkpoint.weights.values()
    size, stored_bytes = sum(value.size for value in weights), sum(value.nbytes for value in weights)
    check_memory(size, _itemsize(command), stored_bytes, _work(command))
    batch = _batch_of_checkpoint(command, checkpoint)
    report = compare_checkpoint(
        checkpoint, batch, dtype=command.dtype, grads=command.grads, replay=command.replay, explain=command.explain
    )
    say_note(found)
    say_assumed(found)
    return report


def _batch_of_checkpoint(command: Parity, checkpoint: Checkpoint) -> np.ndarray:
    config = checkpoint.config
    if checkpoint.of_characters:
        return _tokens(command, config.vocab_size, 1, config.block_size, config.block_size)
    if command.tokens is not None:
        return read_vectors(command.tokens, config.model_dim)
    return random_vectors(config.model_dim, command.batch_size, command.num_tokens or POSITIONS, command.seed)


def _tokens(command: Parity, vocab_size: int, least: int, most: int | None, usual: int) -> np.ndarray:
    if command.tokens is None:
        num_tokens, where = command.num_tokens or usual, "num_tokens"
        tokens = random_tokens(vocab_size, command.batch_size, num_tokens, command.seed)
    else:
        tokens, where = read_tokens(command.tokens), str(command.tokens)
    check_tokens(tokens, vocab_size, least, most, where)
    return tokens


def _against_transformers(command: Parity, found: Found) -> Report:
    from moe_parity.compare import compare_folder

    with as_hf_folder(found, _itemsize(command), _work(command)) as folder:
        tokens = _tokens(command, folder.config.vocab_size, 2, None, POSITIONS)
        return compare_folder(
            folder.place, tokens, dtype=command.dtype, grads=command.grads, replay=command.replay,
            explain=command.explain,
        )


def read_weights(found: Found) -> Checkpoint:
    """The checkpoint with its weights, without an optimizer's state."""
    with jax.enable_x64(True):
        return load_found(found)


@contextmanager
def as_hf_folder(found: Found, itemsize: int, work: Work) -> Iterator[Found]:
    """The model as a folder that transformers can read; any other form is ported to a temporary folder.

    Raises ValueError for a damaged model, and for a model too large for memory, before PyTorch is loaded.
    """
    with TemporaryDirectory() as temporary:
        if found.kind != "hf" or found.unwrapped is not None:  # transformers would not find wrapped names
            path = Path(temporary) / "model"
            with jax.enable_x64(True):
                port_decoder(
                    found, path, "hf", dtype=None, max_shard_bytes=MAX_SHARD_BYTES, overwrite=False,
                    allow_nonfinite=False, progress=progress, say=say,
                )
            found = open_path(path)
        assert found.plan is not None
        parameters = sum(math.prod(shape) for shape in found.plan.our_shapes.values())
        check_memory(parameters, itemsize, sum(tensor.nbytes for tensor in found.stored.values()), work)
        yield found


def _work(command: Parity) -> Work:
    return "gradients" if command.grads else "outputs"


def _itemsize(command: Parity) -> int:
    return np.dtype(command.dtype).itemsize
