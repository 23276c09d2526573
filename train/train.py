"""`python train/train.py` trains; `--help` lists the settings."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The script's own folder would hide the package `train` behind this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.loop import main

    sys.exit(main())
