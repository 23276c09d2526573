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

    Only the last tokens are decoded anew, as far back as the piece before, since what precedes a token decides its spaces.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self.tokenizer, self.tokens = tokenizer, list(prompt)
        self.before, self.shown = 0, len(self.tokens)

    def add(self, token: int) -> str:
        """What can be printed now that this token is there."""
        self.tokens.append(token)
        return self._piece(whole=True)

    def rest(self) -> str:
        """What was still waiting when the text ended."""
        return self._piece(whole=False)

    def _piece(self, whole: bool) -> str:
        printed = self.tokenizer.decode(self.tokens[self.before : self.shown])
        text = self.tokenizer.decode(self.tokens[self.before :])
        if whole and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.before, self.shown = self.shown, len(self.tokens)
        return text[len(printed) :]
