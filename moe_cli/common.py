"""Functions that several subcommands share."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from flax import nnx

from jax_moe.config.checks import require
from jax_moe.disk import writing
from jax_moe.generation.text import read_text
from jax_moe.porting.checkpoint import Checkpoint
from jax_moe.porting.formats.found import Found
from jax_moe.stored import stored_state


def say(line: str) -> None:
    """Prints a remark on stderr."""
    print(f"jax-moe: {line}", file=sys.stderr)


def say_assumed(found: Found) -> None:
    """Prints the settings that a file does not store and that were assumed."""
    if found.assumed:
        say(f"{found.path}: {assumed_in_words(found)}")


def say_note(found: Found) -> None:
    """Prints how a checkpoint was read; for a run, `RunWeights.in_words` is printed instead."""
    if found.note is not None and found.run is None:
        say(f"{found.path}: {found.note}")


def assumed_in_words(found: Found) -> str:
    """Each assumed setting, with the option that changes it."""
    settings = [f"{name}={value} ({option_of(name)})" for name, value in found.assumed.items()]
    return f"assumed, as the file does not store them: {', '.join(settings)}"


def option_of(name: str) -> str:
    """The command-line option of a setting."""
    return f"--{name.replace('_', '-')}"


def with_characters(checkpoint: Checkpoint, text: Path | None) -> Checkpoint:
    """The checkpoint with the sorted characters of a text, which are makeMoE's vocabulary."""
    if text is None:
        return checkpoint
    require(checkpoint.of_characters, "text", str(text), "left out: only a makeMoE language model has characters")
    characters = "".join(sorted(set(read_text(text, str(text)))))
    size = checkpoint.config.vocab_size
    require(len(characters) == size, "text", str(text), f"a text of {size} different characters, has {len(characters)}")
    return dataclasses.replace(checkpoint, characters=characters)


def summary(checkpoint: Checkpoint) -> str:
    """Family, parameters and dtypes in one line."""
    leaves = jax.tree.leaves(nnx.to_pure_dict(stored_state(checkpoint.module)))
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    of_run = "" if checkpoint.note is None else f", {checkpoint.note}"
    return f"{checkpoint.name}, {sum(leaf.size for leaf in leaves):,} parameters, {' and '.join(dtypes)}{of_run}"


def check_page_target(path: Path) -> None:
    """Raises ValueError if no HTML page can be written there; a file that is there will be replaced."""
    try:
        there, folder = path.exists(), path.is_dir()
    except OSError as error:  # a name that the file system does not allow
        raise ValueError(f"html={str(path)!r}: cannot be written ({error.strerror})") from None
    require(not folder, "html", str(path), "the name of a file, is a folder")
    require(not there or path.is_file(), "html", str(path), "the name of a file")
    require(path.parent.is_dir(), "html", str(path), f"in a folder that exists, {path.parent} does not")


def write_page(path: Path, page: str) -> None:
    """Writes an HTML page whole or not at all."""
    with writing(path, overwrite=True) as part:
        part.write_text(page, encoding="utf-8")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes on stderr, if it is a terminal. Yields a function to call with the bytes of each part."""
    if not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)
