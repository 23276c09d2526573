"""Where Python code saves to: as `disk.writing`, but empty folders and missing parents are allowed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jax_moe.disk import writing


@contextmanager
def saving(path: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A path to write to: renamed to `path` at the end; on any error removed together with the parents made for it.

    Raises ValueError if `path` is more than an empty folder and may not be overwritten (`replaceable` recognises a
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
    """Makes the folder with its parents; on any error removes those that were made."""
    made: list[Path] = []
    try:
        try:
            for parent in (*reversed(folder.parents), folder):
                if not parent.exists():
                    parent.mkdir()
                    made.append(parent)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
        yield
    except BaseException:
        for parent in reversed(made):
            with suppress(OSError):  # not empty any more
                parent.rmdir()
        raise
