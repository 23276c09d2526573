"""`python train/plots.py --compare RUN_A RUN_B OUT.png` plots the loss curves of several runs together."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the packages beside this folder

    from moe_train.plots import main

    sys.exit(main())
