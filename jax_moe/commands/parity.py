"""`jax-moe parity`: a checkpoint in both frameworks."""

import jax

from jax_moe.cli import Parity
from jax_moe.commands.common import summary
from jax_moe.config import require
from jax_moe.porting.checkpoint import load


def parity(command: Parity) -> int:
    """Prints the table; 1 if a check fails."""
    from jax_moe.porting.parity import compare

    require(command.batch_size >= 1, "batch_size", command.batch_size, "at least 1")
    require(command.num_tokens is None or command.num_tokens >= 1, "num_tokens", command.num_tokens, "at least 1")
    with jax.enable_x64(True):
        checkpoint = load(command.path, command.choices)
    print(summary(checkpoint))
    checks = compare(checkpoint, batch_size=command.batch_size, num_tokens=command.num_tokens, seed=command.seed)
    print(f"{'check':26} {'worst error':>12} {'allowed':>9}")
    for check in checks:
        where = "" if not check.where else f"  {check.where}"
        print(f"{check.name:26} {check.error:12.2e} {check.tolerance:9.0e}  {'ok' if check.passed else 'FAILED'}{where}")
    return 0 if all(check.passed for check in checks) else 1
