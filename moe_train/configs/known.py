"""What a run to be resumed records of its text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """The defaults are those of a new run."""

    sha256: str | None = None
    vocabulary: str | None = None  # None: the text is tokens, or its own characters are the vocabulary
    vocab_size: int | None = None
    saved: bool = False  # whether there is a checkpoint to continue from
