"""What each subcommand of `jax-moe` does, one file each; `cli.py` says what it takes."""
