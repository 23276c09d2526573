"""`jax-moe generate`: text from a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe.cli import Generate
from jax_moe.commands.common import with_characters
from jax_moe.config import require
from jax_moe.porting.checkpoint import load


def generate(command: Generate) -> int:
    """Prints the prompt and what the model makes of it."""
    checkpoint = with_characters(load(command.path, command.choices), command.text)
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
