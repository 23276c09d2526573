"""What each subcommand of `jax-moe` does; `cli.py` says what it takes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_moe.cli import Generate, Inspect, Parity, Port
from jax_moe.config import require
from jax_moe.porting.checkpoint import Checkpoint, is_folder, load, save
from jax_moe.porting.describe import describe
from jax_moe.porting.files import SUFFIXES, check_target, read_state, write_state


def port(command: Port) -> int:
    """Reads SRC, writes DST, says what was written."""
    to_file = command.dst.suffix in SUFFIXES
    check_target(command.dst, command.overwrite, Path.is_file if to_file else is_folder)
    if not to_file and command.dst.suffix and not command.dst.is_dir():
        raise ValueError(f"{command.dst}: must end in one of {', '.join(SUFFIXES)}, or in nothing for a folder")
    with jax.enable_x64(True):  # moves bits, computes nothing; float64 files need it
        checkpoint = load(command.src, command.choices, allow_nonfinite=command.allow_nonfinite, dtype=command.dtype)
        checkpoint = _with_characters(checkpoint, command.text)
        if to_file:
            write_state(command.dst, checkpoint.state(), overwrite=command.overwrite)
        else:
            save(checkpoint, command.dst, overwrite=command.overwrite)
    print(f"wrote {command.dst}: {_summary(checkpoint)}, read back bit for bit")
    return 0


def inspect(command: Inspect) -> int:
    """Prints what is in a checkpoint; of a file that is no known family, its names. Status 1 if it would not load."""
    fault = None
    with jax.enable_x64(True):
        try:
            checkpoint = load(command.path, command.choices, allow_nonfinite=True)
            arrays = checkpoint.weights if command.path.is_dir() else checkpoint.state()
            print("\n".join([_summary(checkpoint), *describe(checkpoint.config)]))
            if checkpoint.characters is not None:
                print(f"characters: {checkpoint.characters!r}")
        except ValueError as error:
            if command.path.is_dir():
                raise
            fault, arrays = error, read_state(command.path)
    width = max(map(len, arrays), default=0)
    for name, value in arrays.items():
        note = "" if value.dtype.kind in "iub" or np.isfinite(value).all() else "  not finite"
        print(f"{name:{width}}  {value.dtype}  {list(value.shape)}{note}")
    if fault is not None:
        raise fault
    return 0


def generate(command: Generate) -> int:
    """Prints the prompt and what the model makes of it."""
    checkpoint = _with_characters(load(command.path, command.choices), command.text)
    require(checkpoint.family == "makemoe", "path", str(command.path), "a makeMoE language model")
    characters = checkpoint.characters
    if characters is None:
        raise ValueError(f"{command.path}: does not say which characters its tokens are; --text TRAINING_TEXT does")
    unknown = sorted(set(command.prompt) - set(characters))
    require(not unknown, "prompt", command.prompt, f"of the model's characters; it has no {', '.join(map(repr, unknown))}")
    require(command.prompt != "", "prompt", "", "at least one character")
    from jax_moe.generation import generate as continue_text

    tokens = jnp.asarray([[characters.index(one) for one in command.prompt]], jnp.int32)
    key = None if command.temperature == 0 else jax.random.key(command.seed)
    answer = continue_text(
        checkpoint.module, tokens, max_new_tokens=command.max_new_tokens, temperature=command.temperature,  # type: ignore[arg-type]
        top_k=command.sample_top_k, top_p=command.sample_top_p, key=key,
    )
    print("".join(characters[token] for token in np.asarray(answer)[0]))
    return 0


def parity(command: Parity) -> int:
    """Prints the table; 1 if a check fails."""
    from jax_moe.porting.parity import compare

    require(command.batch_size >= 1, "batch_size", command.batch_size, "at least 1")
    require(command.num_tokens is None or command.num_tokens >= 1, "num_tokens", command.num_tokens, "at least 1")
    with jax.enable_x64(True):
        checkpoint = load(command.path, command.choices)
    print(_summary(checkpoint))
    checks = compare(checkpoint, batch_size=command.batch_size, num_tokens=command.num_tokens, seed=command.seed)
    print(f"{'check':26} {'worst error':>12} {'allowed':>9}")
    for check in checks:
        where = "" if not check.where else f"  {check.where}"
        print(f"{check.name:26} {check.error:12.2e} {check.tolerance:9.0e}  {'ok' if check.passed else 'FAILED'}{where}")
    return 0 if all(check.passed for check in checks) else 1


def _with_characters(checkpoint: Checkpoint, text: Path | None) -> Checkpoint:
    """The checkpoint with the sorted characters of a text, as makeMoE makes its vocabulary."""
    if text is None:
        return checkpoint
    require(checkpoint.family == "makemoe", "text", str(text), "left out: only a makeMoE language model has characters")
    try:
        characters = "".join(sorted(set(text.read_text(encoding="utf-8"))))
    except OSError as error:
        raise ValueError(f"{text}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{text}: must be UTF-8 text") from None
    size = checkpoint.config.vocab_size
    require(len(characters) == size, "text", str(text), f"of {size} different characters, has {len(characters)}")
    return dataclasses.replace(checkpoint, characters=characters)


def _summary(checkpoint: Checkpoint) -> str:
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(checkpoint.module, nnx.Param)))
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    return f"{checkpoint.family}, {sum(leaf.size for leaf in leaves):,} parameters, {' and '.join(dtypes)}"
