"""What a run that is resumed says of its text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """Of a new run nothing."""

    sha256: str | None = None
    vocabulary: str | None = None  # None: of tokens, or of the text alone
    vocab_size: int | None = None
    saved: bool = False  # whether it has a checkpoint to go on from
