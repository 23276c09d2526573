"""`python train/train.py` trains; `--help` lists the settings. Installed, the same command is `jax-moe train`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the packages beside this folder

    from moe_train.main import command

    command()
