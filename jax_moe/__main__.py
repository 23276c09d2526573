"""`python -m jax_moe` is `jax-moe`."""

import sys

from moe_cli.main import main

sys.exit(main())
