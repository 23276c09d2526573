"""Where Python code saves to: as `files.writing`, but empty folders and missing parents are allowed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jax_moe.disk import writing


@contextmanager
def saving(path: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A path to write to: renamed to `path` at the end; on any error removed together with the parents made for it.

    Raises ValueError if `path` is more than an empty folder and may not be overwritten (`replaceable` says what is a
    checkpoint), is the working folder, or cannot be written.
    """
    try:
        path = path.resolve() if path.is_symlink() and path.is_dir() else path.absolute()
        here, empty = path == Path.cwd(), path.is_dir() and not any(path.iterdir())
        other = path.is_dir() and not empty and not replaceable(path)
    except OSError as error:  # a name that the file system does not allow
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    if here:
        raise ValueError(f"{path}: must not be the working folder, which is replaced when it is written")
    if other:
        raise ValueError(f"{path}: exists and is not a checkpoint; it must be new, empty or a checkpoint")
    with _parents(path.parent), writing(path, overwrite or empty, lambda old: empty or replaceable(old)) as part:
        yield part


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """The folder with its parents; on any error those that were made are removed again."""
    made: list[Path] = []
    try:
        try:
            for one in (*reversed(folder.parents), folder):
                if not one.exists():
                    one.mkdir()
                    made.append(one)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
        yield
    except BaseException:
        for one in reversed(made):
            with suppress(OSError):  # not empty any more
                one.rmdir()
        raise
