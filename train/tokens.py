"""Tokens for a pretrained model: a text through its folder's tokenizer.json, or a .npy file as it is."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.text import read_tokenizer
from train.data import Corpus, cut, read_text

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Tokens(Corpus):
    """A stream of a model's own tokens; without a tokenizer, text is numbers separated by spaces."""

    vocab_size: int
    tokenizer: Any  # tokenizers.Tokenizer, or None

    @property
    def size(self) -> str:
        """How many kinds of tokens there are, in words."""
        return f"{self.vocab_size:,} kinds of tokens"

    def about(self) -> dict[str, str]:
        """What a run's config.json says of it."""
        return {"source": self.source, "sha256": self.sha256}

    def encode(self, text: str) -> list[int]:
        """Tokens of a string; of blanks that give none, the first of the validation split. Raises ValueError."""
        if self.tokenizer is not None:
            tokens = self.tokenizer.encode(text).ids
        else:
            words = text.split()
            if not all(word.isdecimal() for word in words):
                raise ValueError(f"sample_prompt={text!r}: must be tokens as numbers, the folder has no {TOKENIZER}")
            tokens = [int(word) for word in words]
        if not tokens and not text.strip():
            tokens = [int(self.val[0])]
        if not tokens or max(tokens) >= self.vocab_size:
            raise ValueError(f"sample_prompt={text!r}: must be at least one token, each below vocab_size={self.vocab_size}")
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The string of some tokens."""
        return " ".join(map(str, tokens)) if self.tokenizer is None else self.tokenizer.decode(tokens)


def load_tokens(data: str | None, folder: Path, vocab_size: int, block_size: int) -> Tokens:
    """What `--data` names as the folder's tokens. Raises ValueError with one line for whatever is wrong with it."""
    tokenizer = _tokenizer(folder) if (folder / TOKENIZER).exists() else None
    if data is not None and data.endswith(".npy"):
        tokens, source, digest = _read_npy(data), data, _sha256(Path(data))
    elif tokenizer is None:
        raise ValueError(f"pretrained={str(folder)!r}: must hold {TOKENIZER} to read text; --data FILE.npy gives tokens")
    else:
        text, source = read_text(data)
        # one stream, without what the tokenizer would put around a single text
        tokens = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        digest = hashlib.sha256(text.encode()).hexdigest()
    train, val = cut(tokens, source, block_size, "tokens")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"data={source!r}: token {bad} must be 0 to {vocab_size - 1} (vocab_size={vocab_size} of the model)")
    return Tokens(source=source, sha256=digest, train=train, val=val, vocab_size=vocab_size, tokenizer=tokenizer)


def _tokenizer(folder: Path) -> Any:
    tokenizer = read_tokenizer(folder)
    tokenizer.no_truncation()  # a tokenizer.json may cut every text at the model's length
    tokenizer.no_padding()
    return tokenizer


def _read_npy(path: str) -> np.ndarray:
    """One axis of integers, left on the disk."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise ValueError(f"data={path!r}: must be a readable .npy file of tokens ({reason})") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"data={path!r}: must hold one axis of integers, has shape {tokens.shape} of {tokens.dtype}")
    return tokens


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
