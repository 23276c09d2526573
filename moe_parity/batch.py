"""The batch of a comparison: read from a file, or drawn at random from a seed."""

from pathlib import Path
from typing import Any

import numpy as np

from jax_moe.config.checks import require
from jax_moe.config.moe import MoEConfig
from jax_moe.guarded import read_npy
from jax_moe.shapes import check_token_range


def read_tokens(path: Path) -> np.ndarray:
    """Tokens [B, T] from a .npy file of integers, or from text: a sequence per line, spaces or commas between numbers.

    Raises ValueError for an unreadable file, for any other content, and for sequences of different lengths.
    """
    if path.suffix == ".npy":
        tokens = _read_npy(path)
        if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim not in (1, 2) or not tokens.size:
            found = f"{tokens.dtype} {list(tokens.shape)}"
            raise ValueError(f"{path}: must hold integers [sequences, positions], holds {found}")
        return np.atleast_2d(tokens).astype(np.int64)
    rows = _read_lines(path)
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows[:8])
        more = " ..." if len(rows) > 8 else ""
        raise ValueError(f"{path}: sequences must have the same length, but have {lengths}{more}")
    return np.asarray(rows, np.int64)


def read_vectors(path: Path, model_dim: int) -> np.ndarray:
    """The inputs [B, T, D] of a layer, from a .npy file of floats."""
    allowed = "a .npy of floats [sequences, positions, model_dim] for a layer"
    require(path.suffix == ".npy", "tokens", str(path), allowed)
    x = _read_npy(path)
    fits = np.issubdtype(x.dtype, np.floating) and x.ndim == 3 and x.shape[-1] == model_dim and x.size
    if not fits:
        found = f"{x.dtype} {list(x.shape)}"
        raise ValueError(f"{path}: must hold floats [sequences, positions, {model_dim}], holds {found}")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: must be finite")
    return x


def check_tokens(tokens: np.ndarray, vocab_size: int, least: int, most: int | None, where: str) -> None:
    """Raises ValueError for a token outside the vocabulary, and for too few or too many positions."""

    def place(token: int) -> str:
        row, column = np.argwhere(tokens == token)[0]
        return f"sequence {row + 1}, position {column + 1}"

    check_token_range(int(tokens.min()), int(tokens.max()), vocab_size, f"{where}: ", place)
    length = tokens.shape[1]
    allowed = f"at least {least}" if most is None else f"{least} to {most}"
    if length < least or (most is not None and length > most):
        raise ValueError(f"{where}: {length} positions: must be {allowed}")


def random_tokens(vocab_size: int, batch_size: int, num_tokens: int, seed: int) -> np.ndarray:
    """Tokens [B, T], uniform over the vocabulary."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch_size, num_tokens))


def random_vectors(model_dim: int, batch_size: int, num_tokens: int, seed: int) -> np.ndarray:
    """Standard normal inputs [B, T, D] of a layer."""
    return np.random.default_rng(seed).standard_normal((batch_size, num_tokens, model_dim))


def beside(config: Any, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What a mixture reads beside its vectors [B, T, D]: the tokens of a table, the state before a router. Drawn from a
    seed of their own; empty where it reads none.
    """
    generator, found = np.random.default_rng(1), dict[str, np.ndarray]()
    if not isinstance(config, MoEConfig):
        return found
    if config.router.table_tokens:
        found["tokens_BT"] = generator.integers(0, config.router.table_tokens, shape[:2], dtype=np.int32)
    if config.router.takes_state:
        found["router_state_BTI"] = generator.standard_normal((*shape[:2], config.router.network_dim))
    return found


def _read_lines(path: Path) -> list[list[int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: must be a .npy file, or text with a sequence of numbers per line") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.replace(",", " ").split()
        bad = next((word for word in words if not word.lstrip("-").isdecimal() or len(word) > 18), None)
        if bad is not None:
            raise ValueError(f"{path}: line {number}: {bad[:40]!r}: must be a number (one sequence per line)")
        if words:
            rows.append([int(word) for word in words])
    if not rows:
        raise ValueError(f"{path}: must hold at least one sequence, is empty")
    return rows


def _read_npy(path: Path) -> np.ndarray:
    try:
        return read_npy(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
