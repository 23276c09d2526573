"""A lock on what is being written, held by one process at a time and released when that process ends in any way.

It is a lock of the operating system on a small file: `flock` on Linux and macOS, `msvcrt.locking` on Windows. Over NFS
it holds between machines if the server supports locks (version 4 always does). On a file system without locks nothing
is locked, and nothing left by another process is removed.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class BusyError(Exception):
    """Another process holds the lock."""


class Lock:
    """Takes the lock at once. Raises BusyError if it is held, OSError if its file cannot be created.

    `works`: whether the file system has locks.
    """

    def __init__(self, path: Path):
        self.path = path
        while True:
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            try:
                self.works = _lock(self._descriptor)
                if _is_at(self._descriptor, path):
                    return
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)  # its last holder removed the file before we had the lock

    def lost(self) -> bool:
        """Whether the file was removed or replaced, for example with its folder: then other processes see no lock."""
        return self._descriptor is None or not _is_at(self._descriptor, self.path)

    def release(self) -> None:
        """Removes the file and releases the lock; a second call does nothing."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # Windows removes no open file; the folder may be gone
            if not self.lost():
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None


@contextmanager
def alone(target: Path) -> Iterator[Lock]:
    """Holds the lock beside `target`. Raises ValueError if another process is writing `target`."""
    try:
        lock = Lock(lock_of(target))
    except BusyError:
        said = "is being written by another process; wait for it, or choose another name"
        raise ValueError(f"{target}: {said}") from None
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield lock
    finally:
        lock.release()


def lock_of(target: Path) -> Path:
    """The path of the lock file, beside the target."""
    return target.with_name(f".{target.name}.lock")


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            raise BusyError from None
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise BusyError from None
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
