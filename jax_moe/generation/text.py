"""Text files, and text to and from tokens by a Hugging Face folder's `tokenizer.json`."""

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

NUL_HINT = (
    "which no text holds (tokens go in a .npy of integers; train.py also reads nanoGPT's .bin: --data-dtype uint16)"
)


def read_text(path: Path, where: str, raw_sha256: str | None = None) -> str:
    """The text of a UTF-8 file. Line ends become "\\n", as with Python's `open`; a byte order mark is removed.

    `where` begins each message. A file with the sha256 `raw_sha256` keeps its line ends, as in the first version.
    Raises ValueError, with a remedy, for a file that cannot be read, bytes that are not UTF-8, and NULs.
    """
    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode) and not stat.S_ISDIR(kind.st_mode):
            raise ValueError(f"{where}: must be a readable text file (it is not a regular file)")
        guarded.require_memory(10 * kind.st_size, where)
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: must be a readable text file ({error.strerror})") from None
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: must be a readable text file ({error})") from None  # a NUL in the path
    if raw_sha256 is not None and hashlib.sha256(raw).hexdigest() == raw_sha256:
        return raw.decode("utf-8")
    if raw.startswith(guarded.LFS_POINTER):
        guarded.refuse_pointer(path, raw)
    try:
        text = raw.decode("utf-8").removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        likely = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        remedy = f"iconv -f {likely} -t utf-8 {shlex.quote(str(path))} > new.txt"
        raise ValueError(f"{where}: must be UTF-8, byte {error.start} is not; if it is {likely}: {remedy}") from None
    if "\0" in text:
        raise ValueError(f"{where}: must be text; character {text.index(chr(0))} is NUL, {NUL_HINT}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_tokenizer(folder: Path) -> Any:
    """The folder's `tokenizers.Tokenizer`, with padding and truncation switched off.

    Raises ValueError if the folder has no tokenizer.json, or if the package tokenizers is not installed.
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
    """The prompt's tokens, special tokens included. Raises ValueError if there are none."""
    tokens = tokens_of(tokenizer, prompt)
    require(bool(tokens), "prompt", prompt, "a text of at least one token")
    return tokens


def tokens_of(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """A text's tokens, by default with the tokenizer's special tokens. Raises ValueError if it cannot be encoded."""
    with _no_panic("tokenizer.json: cannot encode this text"):
        return tokenizer.encode(text, add_special_tokens=special).ids


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of the tokens. Raises ValueError if they cannot be decoded."""
    with _no_panic("tokenizer.json: cannot decode these tokens"):
        return tokenizer.decode(list(tokens))


@contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Turns whatever the library raises into ValueError: it has no class of its own, and panics are BaseExceptions."""
    try:
        with _quiet():
            yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({guarded.shorten(error)})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Discards what is written to file descriptor 2, where a panic in Rust prints its traceback."""
    kept = None
    with suppress(OSError, ValueError):  # the process may have no stderr
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
    """The end-of-text tokens: eos_token_id of generation_config.json, else of `config`, the text of config.json.

    Raises ValueError for a file that is not JSON, and for an entry that is neither a token nor a list of tokens.
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
            whole = all(isinstance(token, int) and not isinstance(token, bool) for token in tokens)
            require(whole, f"{file}: eos_token_id", found, "null, a token or a list of tokens")
            return tuple(tokens)
    return ()


class TextStream:
    """Streaming detokenisation by `tokenizers.decoders.DecodeStream`: pieces of text that can be printed at once.

    Bytes of an incomplete character are held back. The decoded prompt, all pieces and the rest together are the text
    that `Tokenizer.decode` returns for all tokens, unless a token changes earlier text (some decoders remove spaces):
    printed text stays, and printing continues after it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self.tokenizer, self.tokens, self.text = tokenizer, list[int](), ""
        self.in_prompt = ""  # held back by the stream, but printed with the prompt
        self._start()
        for token in prompt:
            self.add(token)
        self.in_prompt = self._held_back()

    def add(self, token: int) -> str:
        """The text to print after this token, "" if it is held back."""
        self.tokens.append(token)
        try:
            with _no_panic(f"token {token}: cannot be decoded"):
                piece = self.stream.step(self.tokenizer, token) or ""
        except ValueError as error:
            if "prefix" not in str(error).lower():
                raise
            piece = self._held_back()  # the token changed text before it, which the library refuses
            self._start()
        self.text += piece
        return self._unprinted(piece)

    def rest(self) -> str:
        """The text that is still held back at the end."""
        return self._unprinted(self._held_back())

    def _held_back(self) -> str:
        return text_of(self.tokenizer, self.tokens)[len(self.text) :]

    def _unprinted(self, piece: str) -> str:
        """The piece without the part that was printed with the prompt."""
        if not piece:
            return ""
        pairs = zip(self.in_prompt, piece, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.in_prompt))
        self.in_prompt = ""
        return piece[same:]

    def _start(self) -> None:
        from tokenizers.decoders import DecodeStream

        self.stream = DecodeStream(skip_special_tokens=True)
