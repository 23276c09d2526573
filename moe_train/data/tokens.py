"""Tokens in place of characters: of a text, by a pretrained model's tokenizer.json, or from a file of tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.config.checks import require
from jax_moe.generation.text import read_tokenizer, text_of, tokens_of
from jax_moe.guarded import read_npy
from jax_moe.shapes import check_token_range
from moe_train.data.text import Corpus, cut, read_data

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Tokens(Corpus):
    """A stream of a model's tokens. Without a tokenizer, a text is token numbers separated by spaces."""

    vocab_size: int
    tokenizer: Any  # tokenizers.Tokenizer, or None

    @property
    def size(self) -> str:
        """The size of the vocabulary, in words."""
        return f"{self.vocab_size:,} kinds of tokens"

    def about(self) -> dict[str, str]:
        """The text's entry in a run's config.json."""
        return {"source": self.source, "sha256": self.sha256}

    def encode(self, text: str) -> list[int]:
        """The tokens of a string; if blanks give none, the first token of the validation split. Raises ValueError."""
        if self.tokenizer is not None:
            tokens = tokens_of(self.tokenizer, text)
        else:
            words = text.split()
            if not all(word.isdecimal() for word in words):
                raise ValueError(f"sample_prompt={text!r}: must be tokens as numbers, there is no {TOKENIZER}")
            tokens = [int(word) for word in words]
        if not text.strip() and max(tokens, default=self.vocab_size) >= self.vocab_size:
            tokens = [int(self.val[0])]
        if not tokens or max(tokens) >= self.vocab_size:
            allowed = f"at least one token, each below vocab_size={self.vocab_size}"
            raise ValueError(f"sample_prompt={text!r}: must be {allowed}")
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The string of the tokens."""
        return " ".join(map(str, tokens)) if self.tokenizer is None else text_of(self.tokenizer, tokens)


def holds_tokens(data: str | None, dtype: str | None) -> bool:
    """Whether `--data` names a file of tokens, not of text. Raises ValueError for a dtype if the file has its own."""
    has_own = data is None or data.endswith(".npy") or data == "tinyshakespeare"
    require(dtype is None or not has_own, "data_dtype", dtype, f"left out with data={data!r}")
    return dtype is not None or (data is not None and data.endswith(".npy"))


def load_tokens(
    data: str | None, folder: Path | None, vocab_size: int | None, block_size: int,
    dtype: str | None = None, sha256: str | None = None,
) -> Tokens:
    """The tokens that `--data` names: those of a file, or of a text by the folder's tokenizer.

    Without `vocab_size` the vocabulary is the tokens in the file. `sha256` is that of the text of a run to be resumed.
    Raises ValueError with one line for whatever is wrong.
    """
    tokenizer = read_tokenizer(folder) if folder is not None and (folder / TOKENIZER).exists() else None
    if holds_tokens(data, dtype):
        assert data is not None
        tokens = _read_npy(data) if dtype is None else _read_bin(data, dtype)
        source, digest = data, _sha256(Path(data))
    elif tokenizer is None:
        needed = f"must hold {TOKENIZER} to read text; --data FILE.npy gives tokens"
        raise ValueError(f"pretrained={str(folder)!r}: {needed}")
    else:
        text, source = read_data(data, sha256)
        # one stream, without the tokenizer's special tokens
        tokens = np.asarray(tokens_of(tokenizer, text, special=False), np.int32)
        digest = hashlib.sha256(text.encode()).hexdigest()
    train, val = cut(tokens, source, block_size, "tokens")
    low, high = int(tokens.min()), int(tokens.max())
    size = high + 1 if vocab_size is None else vocab_size
    check_token_range(low, high, size, f"data={source!r}: ")
    return Tokens(source=source, sha256=digest, train=train, val=val, vocab_size=size, tokenizer=tokenizer)


def _read_npy(path: str) -> np.ndarray:
    """The integers of a .npy file of one axis, memory-mapped."""
    what = f"data={path!r}: must be a readable .npy file of tokens"
    try:
        tokens = read_npy(Path(path), mapped=True)
    except OSError as error:
        raise ValueError(f"{what} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{what} ({str(error).removeprefix(f'{path}: ')})") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"data={path!r}: must hold one axis of integers, has shape {tokens.shape} of {tokens.dtype}")
    return tokens


def _read_bin(path: str, dtype: str) -> np.ndarray:
    """The tokens of a file that holds nothing else, memory-mapped."""
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        regular, size = Path(path).is_file(), Path(path).stat().st_size
        if not regular or size == 0 or size % kind.itemsize:
            has = f"has {size:,} bytes" if regular else "is no file"
            raise ValueError(f"data={path!r}: must be a file of {dtype} tokens, {kind.itemsize} bytes each; it {has}")
        return np.asarray(np.memmap(path, kind, mode="r"))
    except OSError as error:
        raise ValueError(f"data={path!r}: must be a readable file of tokens ({error.strerror})") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
