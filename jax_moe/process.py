"""A command and its process: any character can be printed, Ctrl-C is answered, libraries do not have the last word."""

import os
import signal
import sys
import warnings
from types import FrameType

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells report it


def own() -> None:
    """For the process's own command: Ctrl-C raises KeyboardInterrupt once, and a further one ends the process at once.

    So no KeyboardInterrupt is raised while the first is answered. An ignored SIGINT, as of a job in the background,
    stays ignored. Coroutines that a library leaves behind after an error, as Orbax's threads do, print no warning.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise_once)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


def any_encoding() -> None:
    """Makes stdout and stderr print characters that they cannot encode as escapes, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _raise_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, _end)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
