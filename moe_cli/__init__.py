"""The subcommands of `jax-moe`, a file for each; `arguments.py` defines their options."""
