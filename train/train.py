"""`python train/train.py` trains; `--help` lists the settings."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The script's own folder would hide the package `train` behind this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    try:
        import train.run.interrupt  # first: an interrupt during the next imports needs it
        from train.options import answer_help

        answer_help(sys.argv[1:])
        from train.loop import main

        status = main()
    except KeyboardInterrupt:  # during an import, or a second Ctrl-C while the first is answered
        print("stopped at once, nothing more was saved", file=sys.stderr)
        status = 130
    train.run.interrupt.leave(status)
