"""Training: `python train/train.py`, and `jax-moe train` where the package is installed."""

INSTALLED = "jax-moe train"  # sys.argv[0] of a run that the installed command starts
