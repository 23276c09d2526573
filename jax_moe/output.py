"""What a command prints, whatever the terminal can show."""

import sys


def any_encoding() -> None:
    """From now on a character that stdout or stderr cannot show is printed as its escape, and is no error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
