"""`jax-moe generate`: generates text with a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe.config.checks import require
from jax_moe.generation.generate import generate as continue_text
from jax_moe.generation.text import TextStream, encode, end_tokens, read_tokenizer
from jax_moe.models.decoder import Decoder
from jax_moe.models.makemoe import MakeMoE
from jax_moe.porting.checkpoint import Checkpoint, load_found
from jax_moe.porting.formats.found import Found
from jax_moe.porting.formats.open import open_path
from moe_cli.arguments import Generate
from moe_cli.common import say, say_assumed, say_note, with_characters


def generate(command: Generate) -> int:
    """Prints the prompt and the text that the model adds."""
    both = command.prompt is None or command.tokens is None
    require(both, "tokens", command.tokens, "left out where there is a prompt")
    _check_choices(command)
    found = open_path(command.path, command.choices)
    checkpoint = with_characters(load_found(found), command.text)
    if found.decoder:
        _with_tokens(command, checkpoint)
        _say_which(found)
        return 0
    require(checkpoint.of_characters, "path", str(command.path), "a makeMoE language model or a Hugging Face folder")
    answer = _with_characters(command, checkpoint)
    _say_which(found)
    print(answer)
    return 0


def _check_choices(command: Generate) -> None:
    """Raises ValueError for --top-k with a folder, which sets the experts per token itself: sampling must be meant."""
    k = command.choices.top_k
    if k is not None and command.path.is_dir():
        means = "the experts of a token, which a folder's config.json sets"
        instead = f"--sample-top-k {k} samples from the {k} most likely tokens"
        raise ValueError(f"top_k={k}: means {means}: must be left out; {instead}")


def _settings(command: Generate) -> dict[str, Any]:
    require(0 <= command.seed < 2**32, "seed", command.seed, f"0 to {2**32 - 1}")  # jax wraps around larger seeds
    return {
        "max_new_tokens": command.max_new_tokens, "temperature": command.temperature, "top_k": command.sample_top_k,
        "top_p": command.sample_top_p, "key": None if command.temperature == 0 else jax.random.key(command.seed),
    }


def _with_characters(command: Generate, checkpoint: Checkpoint) -> str:
    """The prompt and the text that the model adds."""
    require(command.tokens is None, "tokens", command.tokens, "left out: a makeMoE model reads characters")
    characters, prompt = checkpoint.characters, "\n" if command.prompt is None else command.prompt
    if characters is None:
        instead = "give them by --text TRAINING_TEXT"
        raise ValueError(f"{command.path}: does not store the characters of its tokens; {instead}")
    unknown = sorted(set(prompt) - set(characters))
    allowed = f"of the model's characters; the model has no {', '.join(map(repr, unknown))}"
    require(not unknown, "prompt", prompt, allowed)
    require(prompt != "", "prompt", "", "at least one character")
    tokens = np.asarray([[characters.index(character) for character in prompt]], np.int32)
    assert isinstance(checkpoint.module, MakeMoE)
    answer = continue_text(checkpoint.module, tokens, **_settings(command))
    return "".join(characters[token] for token in np.asarray(answer)[0])


def _say_which(found: Found) -> None:
    """Prints which weights of an unfinished run these are, how a file was read, and what was assumed."""
    if found.run is not None and found.run.unfinished:
        say(found.run.in_words())
    say_note(found)
    say_assumed(found)


def _with_tokens(command: Generate, checkpoint: Checkpoint) -> None:
    """Prints the text token by token; prints token numbers if the prompt is given as numbers."""
    model = checkpoint.module
    assert isinstance(model, Decoder) and model.origin is not None
    folder = Path(model.origin.directory)  # of a run: the folder that has the tokenizer
    stop_tokens = end_tokens(folder, model.origin.config_json)
    for token in stop_tokens:
        where = "generation_config.json or config.json"
        allowed = f"0 to {model.config.vocab_size - 1}, the model's vocabulary; correct {where}"
        require(0 <= token < model.config.vocab_size, f"{command.path}: eos_token_id", token, allowed)
    if command.tokens is None:
        require(command.prompt is not None, "prompt", None, "given, or --tokens instead")
        assert command.prompt is not None
        tokenizer = read_tokenizer(folder)
        tokens = encode(tokenizer, command.prompt)
        stream = TextStream(tokenizer, tokens)
        begin, piece, end = command.prompt, stream.add, stream.rest
    else:
        tokens = _numbers(command.tokens)
        begin, piece, end = ",".join(map(str, tokens)), lambda token: f",{token}", lambda: ""
    model.check_tokens(np.asarray([tokens], np.int32))
    show = _printer(begin, piece, stop_tokens)
    continue_text(model, np.asarray([tokens], np.int32), stop_tokens=stop_tokens, callback=show, **_settings(command))
    print(end(), flush=True)


def _printer(
    begin: str, piece: Callable[[int], str], stop_tokens: tuple[int, ...]
) -> Callable[[int, np.ndarray], None]:
    """Prints the prompt together with the first token, so that an error before it prints nothing."""

    def show(step: int, token_B: np.ndarray) -> None:
        token = int(token_B[0])
        print((begin if step == 0 else "") + ("" if token in stop_tokens else piece(token)), end="", flush=True)

    return show


def _numbers(tokens: str) -> list[int]:
    try:
        return [int(number) for number in tokens.split(",")]
    except ValueError:
        raise ValueError(f"tokens={tokens!r}: must be whole numbers separated by commas, like 1,2,3") from None
