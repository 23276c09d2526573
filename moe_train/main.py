"""Training as a command: `python train/train.py` and `jax-moe train`."""

import signal
import sys
from typing import NoReturn

from jax_moe import process
from moe_train.run.interrupt import leave


def command() -> NoReturn:
    """Trains as sys.argv says, and ends the process."""
    process.own()
    try:
        from moe_train.options import answer_help

        try:
            answer_help(sys.argv[1:])
        except SystemExit as ended:
            leave(ended.code if isinstance(ended.code, int) else 0)
        except BrokenPipeError:  # the reader of the pipe, such as head, has stopped
            leave(0)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            leave(1)
        from moe_train.loop import main

        status = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends anyway
    except KeyboardInterrupt:  # during an import, or a second Ctrl-C while the first is answered
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("stopped at once, nothing more was saved", file=sys.stderr)
        status = process.INTERRUPTED
    leave(status)
