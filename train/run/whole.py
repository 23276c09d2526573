"""Files that appear whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: renamed to `path` at the end, removed on any error.

    An error of the operating system names `path`.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno is not None:  # of the system; it may not name the file yet
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # already renamed, or the folder cannot be written
            part.unlink()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
