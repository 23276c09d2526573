"""What several subcommands share."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from jax_moe.config import require
from jax_moe.porting.checkpoint import Checkpoint


def with_characters(checkpoint: Checkpoint, text: Path | None) -> Checkpoint:
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


def summary(checkpoint: Checkpoint) -> str:
    """Family, parameters and dtypes in one line."""
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(checkpoint.module, nnx.Param)))
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    return f"{checkpoint.family}, {sum(leaf.size for leaf in leaves):,} parameters, {' and '.join(dtypes)}"
