"""What a command prints, whatever the terminal can show."""

import sys


def any_encoding() -> None:
    """Makes stdout and stderr print characters that they cannot encode as escapes, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
