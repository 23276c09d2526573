"""A path held by one process: whoever comes second is refused before anything is written.

The lock is the operating system's (`flock`), so that it ends with its process however that ends, `kill -9` included. On a
platform without `flock` (Windows) nothing is held.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class TakenError(ValueError):
    """Another process holds the lock."""


class Claim:
    """An exclusive lock on a file, which is made for it and removed when it is released.

    Raises TakenError if another process holds it, OSError if the file cannot be made.
    """

    def __init__(self, file: Path):
        self.file = file
        while True:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock()
                if self.holds():  # the holder before may have removed the file between our two calls
                    return
                os.close(self._descriptor)
            except BaseException:
                os.close(self._descriptor)
                raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TakenError(f"{self.file}: is locked by another process") from None

    def holds(self) -> bool:
        """Whether the locked file is still at its path: not if its folder was removed or replaced."""
        if self._descriptor < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Removes the file and frees the lock."""
        if self._descriptor >= 0:
            with suppress(OSError):
                if self.holds():
                    self.file.unlink()
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds `path` while entered, by a lock file beside it. Raises ValueError if another process holds it."""
    try:
        claim = Claim(path.with_name(f".{path.name}.lock"))
    except TakenError:
        raise ValueError(f"{path}: cannot be written, another process is writing it") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        claim.release()
