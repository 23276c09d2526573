"""Ctrl-C and SIGTERM as requests that the training loop answers between two steps."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """While entered, the first signal sets `requested`; a second signal has its usual effect."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def meet(self) -> None:
        """Called between steps, where a signal of another process may be heard of."""

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def leave(status: int) -> None:
    """Ends the process, its output flushed; after an error without waiting for threads that a library left running."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends anyway
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader is gone, or the disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if status and any(not thread.daemon for thread in others):
        os._exit(status)
    sys.exit(status)
