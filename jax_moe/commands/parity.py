"""`jax-moe parity`: a checkpoint in both frameworks."""

import jax

from jax_moe.cli import Parity
from jax_moe.commands.common import summary
from jax_moe.config import require
from jax_moe.porting.checkpoint import load
from jax_moe.porting.hf_folder import is_hf
from jax_moe.porting.parity import Check


def parity(command: Parity) -> int:
    """Prints the table; 1 if a check fails."""
    require(command.batch_size >= 1, "batch_size", command.batch_size, "at least 1")
    least = 2 if is_hf(command.path) else 1  # the loss is of the next token
    require(command.num_tokens is None or command.num_tokens >= least, "num_tokens", command.num_tokens, f"at least {least}")
    checks = _against_transformers(command) if is_hf(command.path) else _against_torch_ref(command)
    print(f"{'check':26} {'worst error':>12} {'allowed':>9}")
    for check in checks:
        where = "" if not check.where else f"  {check.where}"
        print(f"{check.name:26} {check.error:12.2e} {check.tolerance:9.0e}  {'ok' if check.passed else 'FAILED'}{where}")
    return 0 if all(check.passed for check in checks) else 1


def _against_torch_ref(command: Parity) -> list[Check]:
    from jax_moe.porting.parity import compare

    with jax.enable_x64(True):
        checkpoint = load(command.path, command.choices)
    require(checkpoint.family != "decoder", "path", str(command.path), "a Hugging Face folder (`jax-moe port` makes one of this)")
    print(summary(checkpoint))
    return compare(checkpoint, batch_size=command.batch_size, num_tokens=command.num_tokens, seed=command.seed)


def _against_transformers(command: Parity) -> list[Check]:
    from jax_moe.porting.hf_folder import open_folder
    from jax_moe.porting.hf_parity import compare, import_transformers

    if command.choices.given():
        raise ValueError(f"{', '.join(command.choices.given())}: must be left out for a folder, config.json has them")
    with open_folder(command.path) as folder:  # what is wrong with it is said before PyTorch is loaded
        model_type = folder.model_type
    version = import_transformers().__version__
    print(f"{model_type}: jax_moe.Decoder against transformers {version}, training loss with the balance loss")
    return compare(command.path, batch_size=command.batch_size, num_tokens=command.num_tokens, seed=command.seed)
