"""Text in and out of a Hugging Face model: its folder's `tokenizer.json` by the library `tokenizers`, its end of text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_moe.config import require


def read_tokenizer(folder: Path) -> Any:
    """The folder's `tokenizers.Tokenizer`. Raises ValueError if there is none, or no library to read it."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder}: has no tokenizer.json; --tokens 1,2,3 gives the prompt in numbers")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(f"{file}: needs the package tokenizers: pip install 'jax-moe[text]'") from None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no type of its own
        raise ValueError(f"{file}: must be a tokenizer of the tokenizers library ({' '.join(str(error).split())})") from None


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens, with what the tokenizer itself puts around a text. Raises ValueError if there are none."""
    tokens = tokenizer.encode(prompt).ids
    require(bool(tokens), "prompt", prompt, "a text of at least one token")
    return tokens


def end_tokens(folder: Path, config: str) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, or else of the text of Hugging Face's config.json: none, one or several.

    Raises ValueError for a file that is not JSON or an entry that is not a token.
    """
    for file in (folder / "generation_config.json", folder / "config.json"):
        try:
            text = config if file.name == "config.json" else file.read_text(encoding="utf-8")
            found = json.loads(text).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: must be a JSON object ({error})") from None
        tokens = found if isinstance(found, list) else [found]
        if found is not None:
            whole = all(isinstance(one, int) and not isinstance(one, bool) for one in tokens)
            require(whole, f"{file}: eos_token_id", found, "null, a token or a list of tokens")
            return tuple(tokens)
    return ()


class TextStream:
    """A growing text in pieces that can be printed as they are: half a character waits for its other half.

    By the library's own incremental decoder: prompt, pieces and rest are the text that `Tokenizer.decode` makes of all tokens.
    Where a token changes what was printed before (a decoder that takes spaces away again), printing goes on behind it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self.tokenizer, self.tokens, self.text, self.waiting = tokenizer, list[int](), "", ""
        self._start()
        for token in prompt:
            self.add(token)
        self.waiting = self._left()  # printed with the prompt

    def add(self, token: int) -> str:
        """What can be printed now that this token is there."""
        self.tokens.append(token)
        try:
            piece = self.stream.step(self.tokenizer, token) or ""
        except Exception as error:  # the library raises no type of its own
            if "prefix" not in str(error).lower():
                raise ValueError(f"token {token}: cannot be decoded ({' '.join(str(error).split())})") from None
            piece = self._left()
            self._start()
        self.text += piece
        return self._unprinted(piece)

    def rest(self) -> str:
        """What was still waiting when the text ended."""
        return self._unprinted(self._left())

    def _left(self) -> str:
        return self.tokenizer.decode(self.tokens)[len(self.text) :]

    def _unprinted(self, piece: str) -> str:
        """The piece without what of it came with the prompt."""
        if not piece:
            return ""
        same = next((i for i, (a, b) in enumerate(zip(self.waiting, piece, strict=False)) if a != b), len(self.waiting))
        self.waiting = ""
        return piece[same:]

    def _start(self) -> None:
        from tokenizers.decoders import DecodeStream

        self.stream = DecodeStream(skip_special_tokens=True)
