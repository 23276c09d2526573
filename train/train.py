"""`python train/train.py` trains; `--help` lists the settings."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # The script's own folder would hide the package `train` behind this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    try:
        from train.loop import main

        status = main()
    except KeyboardInterrupt:  # before there is anything to save
        print("stopped", file=sys.stderr)
        status = 130
    if status == 1:  # threads of the checkpoint library may outlive the error that they died of, and print it at length
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
