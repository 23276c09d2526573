"""`jax-moe routing`: which experts a text uses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jax_moe
from jax_moe.config.checks import require
from jax_moe.config.describe import describe
from jax_moe.config.describe import numbers as layers_in_words
from jax_moe.generation.text import TextStream, read_text, read_tokenizer, text_of, tokens_of
from jax_moe.models.decoder import Decoder
from jax_moe.porting.checkpoint import Checkpoint, load_found
from jax_moe.porting.formats.open import open_path
from moe_cli.arguments import Routing
from moe_cli.common import check_page_target, say, say_assumed, say_note, summary, with_characters, write_page
from moe_parity.batch import read_tokens
from moe_parity.routing.numbers import LayerNumbers, numbers
from moe_parity.routing.observe import Observed, observe, window_length

TOKENS = ".npy"  # the suffix of a file of tokens


def routing(command: Routing) -> int:
    """Prints a line for each layer or, with --json, all numbers; writes the page."""
    require(command.max_tokens >= 1, "max_tokens", command.max_tokens, "at least 1")
    if command.html is not None:
        check_page_target(command.html)
        same = command.html.exists() and command.text.exists() and command.html.samefile(command.text)
        require(not same, "html", str(command.html), "another file than --text")
    found = open_path(command.path, command.choices)
    of_characters = not found.decoder and found.family.state is not None and found.family.state.takes == "characters"
    allowed = "a language model with routed experts: makeMoE or a Hugging Face folder"
    require(found.decoder or of_characters, "path", str(command.path), allowed)
    checkpoint = with_characters(load_found(found), command.training_text)
    words = _Words(command, checkpoint)
    sequences, notes = _cut(_sequences(command, words), command.max_tokens)
    model: Any = checkpoint.module
    observed = observe(model, sequences)
    layers = numbers(observed, model.config.moe_layers, model.config.moe.num_experts)
    if found.run is not None:
        say(found.run.in_words())
    say_note(found)
    say_assumed(found)
    for note in notes:
        say(note)
    if command.html is not None:
        write_page(command.html, _page(command, checkpoint, words, sequences, observed, layers, notes))
    if command.json:
        print(json.dumps(_as_json(checkpoint, words, observed, layers), indent=1))
        return 0
    _print(observed, layers)
    if command.html is not None:
        print(f"wrote {command.html}")
    return 0


class _Words:
    """The model's tokens as text and back: by its tokenizer, its characters, or as numbers where it has neither."""

    def __init__(self, command: Routing, checkpoint: Checkpoint):
        self.path, self.characters, self.tokenizer = command.path, checkpoint.characters, None
        if isinstance(checkpoint.module, Decoder):
            assert checkpoint.module.origin is not None
            folder = Path(checkpoint.module.origin.directory)
            if command.text.suffix != TOKENS or (folder / "tokenizer.json").is_file():
                self.tokenizer = _tokenizer(folder)

    def tokens(self, text: str, where: str) -> list[int]:
        """The text's tokens. Raises ValueError for characters that the model does not know."""
        if self.tokenizer is not None:
            return tokens_of(self.tokenizer, text)
        if self.characters is None:
            instead = "give them by --training-text FILE, or tokens in a .npy"
            raise ValueError(f"{self.path}: does not store the characters of its tokens; {instead}")
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            shown = ", ".join(map(repr, unknown[:10])) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            raise ValueError(f"{where}: must be of the model's characters; the model has no {shown}")
        number = {character: token for token, character in enumerate(self.characters)}
        return [number[character] for character in text]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token of a sequence adds; "" for marks, and until a character is complete."""
        if self.tokenizer is not None:
            stream = TextStream(self.tokenizer, ())
            return [stream.add(token) for token in tokens]
        return [f"{token} " if self.characters is None else self.characters[token] for token in tokens]

    def name(self, token: int) -> str:
        """What a token is called on its own, never empty."""
        if self.tokenizer is None:
            return str(token) if self.characters is None else self.characters[token]
        entry = self.tokenizer.id_to_token(token)
        if entry is None:  # the vocabulary of the model is larger than that of its tokenizer
            return f"<{token}>"
        alone = text_of(self.tokenizer, [token])
        if "\u2581" in entry:  # a space, which decoding leaves out at the beginning of a text
            return entry.replace("\u2581", " ")
        return entry if alone == "" or "\N{REPLACEMENT CHARACTER}" in alone else alone


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: has no tokenizer.json; give tokens in a .npy file by --text")
    return read_tokenizer(folder)


def _sequences(command: Routing, words: _Words) -> list[np.ndarray]:
    """The tokens of the file, one or several sequences."""
    where = str(command.text)
    if command.text.suffix == TOKENS:
        return list(read_tokens(command.text))
    tokens = words.tokens(read_text(command.text, where), where)
    require(bool(tokens), "text", where, "a text of at least one token, is empty")
    return [np.asarray(tokens)]


def _cut(sequences: list[np.ndarray], most: int) -> tuple[list[np.ndarray], list[str]]:
    """The first `most` tokens, and a note if that is not all."""
    total, kept = sum(map(len, sequences)), list[np.ndarray]()
    for each in sequences:
        left = most - sum(map(len, kept))
        if left > 0:
            kept.append(each[:left])
    cut = f"the first {most:,} of {total:,} tokens; --max-tokens {total} reads all"
    return kept, [cut] if total > most else []


def _page(
    command: Routing, checkpoint: Checkpoint, words: _Words, sequences: list[np.ndarray], observed: Observed,
    layers: Sequence[LayerNumbers], notes: list[str],
) -> str:
    from moe_parity.pages.routing import Text, page

    model: Any = checkpoint.module
    N, length, windows = len(observed.token_N), window_length(model), int(observed.start_N.sum())
    read = f"{N:,} tokens of {command.text.name}"
    if windows > 1:
        read += f", in {windows:,} windows of at most {length:,} tokens, each read alone"
    about = [summary(checkpoint), f"{read}; jax-moe {jax_moe.__version__}", *notes]
    if model.config.moe.router.noise != "none":
        about.append("The router's noise is left out: these are the choices of its clean logits.")
    dense = [i for i in range(model.config.num_layers) if i not in model.config.moe_layers]
    if dense:
        about.append(f"Dense, and left out: {layers_in_words(dense)}.")
    text = Text(
        token_N=observed.token_N, start_N=observed.start_N,
        pieces=[piece for each in sequences for piece in words.pieces(each.tolist())],
        names={token: words.name(token) for token in np.unique(observed.token_N).tolist()},
    )
    title = f"{command.path.resolve().name}: the experts of a text"
    return page(title, about, describe(model.config), text, layers)


def _as_json(
    checkpoint: Checkpoint, words: _Words, observed: Observed, layers: Sequence[LayerNumbers]
) -> dict[str, Any]:
    model: Any = checkpoint.module
    rows = [each.to_json() for each in layers]
    for row in rows:
        for taken in row["taken"]:
            taken[:] = [{"token": each["token"], "text": words.name(each["token"]), **each} for each in taken]
    return {
        "model": checkpoint.name, "tokens": len(observed.token_N), "num_experts": model.config.moe.num_experts,
        "top_k": model.config.moe.top_k, "window": window_length(model), "layers": rows,
    }


def _print(observed: Observed, layers: Sequence[LayerNumbers]) -> None:
    """A line for each layer."""
    E, K = len(layers[0].choices_E), layers[0].expert_NK.shape[1]
    print(f"{len(observed.token_N):,} tokens, {K} of {E} experts each; the even load is {1 / E:.1%}")
    for each in layers:
        load_E = each.load_E
        print(
            f"layer {each.layer}: load {load_E.min():.1%} (expert {load_E.argmin()}) to {load_E.max():.1%} (expert "
            f"{load_E.argmax()}), entropy {each.entropy:.3f} nats ({each.entropy_share:.0%} of log {E}), dropped "
            f"{each.dropped_fraction:.1%}"
        )
