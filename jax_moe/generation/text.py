"""Text of a file; text in and out of a Hugging Face model: its folder's `tokenizer.json`, its end of text."""

import hashlib
import os
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jax_moe import guarded
from jax_moe.config.checks import require

NUL_HINT = "which no text has (tokens go in a .npy of integers; train.py also reads nanoGPT's .bin: --data-dtype uint16)"


def read_text(path: Path, where: str, as_it_is: str | None = None) -> str:
    """A file's text as Python's `open` reads it: UTF-8, the end of a line always "\\n"; a mark of the byte order is left out.

    `where` begins each message. A file of the sha256 `as_it_is` is decoded only, as the first version read it. Raises
    ValueError for a file that cannot be read, bytes that are not UTF-8 and NULs, with what to do about it.
    """
    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode) and not stat.S_ISDIR(kind.st_mode):
            raise ValueError(f"{where}: must be a readable text file (it is no file)")
        guarded.require_memory(10 * kind.st_size, where)
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: must be a readable text file ({error.strerror})") from None
    except ValueError as error:  # a NUL in the name, from Python
        raise error if str(error).startswith(where) else ValueError(f"{where}: must be a readable text file ({error})") from None
    if as_it_is is not None and hashlib.sha256(raw).hexdigest() == as_it_is:
        return raw.decode("utf-8")
    if raw.startswith(guarded.LFS_POINTER):
        guarded.refuse_pointer(path, raw)
    try:
        text = raw.decode("utf-8").removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        known = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        cure = f"iconv -f {known} -t utf-8 {shlex.quote(str(path))} > new.txt"
        raise ValueError(f"{where}: must be UTF-8, byte {error.start} is not; if it is {known}: {cure}") from None
    if "\0" in text:
        raise ValueError(f"{where}: must be text; character {text.index(chr(0))} is NUL, {NUL_HINT}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_tokenizer(folder: Path) -> Any:
    """The folder's `tokenizers.Tokenizer`, which neither pads nor cuts, whatever its file says of batches.

    Raises ValueError if there is none, or no library to read it.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder}: has no tokenizer.json; --tokens 1,2,3 gives the prompt in numbers")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(f"{file}: needs the package tokenizers: pip install 'jax-moe[text]'") from None
    guarded.refuse_pointer_file(file)
    with _no_panic(f"{file}: must be a tokenizer of the tokenizers library"):
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens, with what the tokenizer itself puts around a text. Raises ValueError if there are none."""
    tokens = tokens_of(tokenizer, prompt)
    require(bool(tokens), "prompt", prompt, "a text of at least one token")
    return tokens


def tokens_of(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """A text's tokens, with or without what the tokenizer puts around a text. Raises ValueError where it cannot encode it."""
    with _no_panic("tokenizer.json: cannot encode this text"):
        return tokenizer.encode(text, add_special_tokens=special).ids


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of some tokens. Raises ValueError where the tokenizer cannot decode them."""
    with _no_panic("tokenizer.json: cannot decode these tokens"):
        return tokenizer.decode(list(tokens))


@contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """ValueError for all that the library raises: it has no type of its own, and a panic of it is a BaseException."""
    try:
        with _quiet():
            yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({guarded.shorten(error)})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process's stderr, on which a panic writes its own traceback, past Python's."""
    kept = None
    with suppress(OSError, ValueError):  # there may be no stderr
        sys.stderr.flush()
        kept, silent = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 2)
        os.close(silent)
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)


def end_tokens(folder: Path, config: str) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, or else of the text of Hugging Face's config.json: none, one or several.

    Raises ValueError for a file that is not JSON or an entry that is not a token.
    """
    for file in (folder / "generation_config.json", folder / "config.json"):
        try:
            values = guarded.parse_json(config, file) if file.name == "config.json" else guarded.read_object(file)
        except FileNotFoundError:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{file}: must be a JSON object")
        found = values.get("eos_token_id")
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
            with _no_panic(f"token {token}: cannot be decoded"):
                piece = self.stream.step(self.tokenizer, token) or ""
        except ValueError as error:
            if "prefix" not in str(error).lower():
                raise
            piece = self._left()
            self._start()
        self.text += piece
        return self._unprinted(piece)

    def rest(self) -> str:
        """What was still waiting when the text ended."""
        return self._unprinted(self._left())

    def _left(self) -> str:
        return text_of(self.tokenizer, self.tokens)[len(self.text) :]

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
