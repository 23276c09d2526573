"""`python -m jax_moe` is `jax-moe`."""

import sys

from jax_moe.cli import main

sys.exit(main())
