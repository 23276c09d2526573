"""The language of porting tables: rows of (their name, their dims, our path, our dims), and how rows compose.

"Theirs" is the side of files and PyTorch modules, "ours" that of jax_moe. Dims are words separated by spaces. A word is
a letter (`D`), a group stored as one axis (`(H A)`, last fastest) or a part of an axis: `0/2` is index 0 of 2, and
`1|A+A+J*O` the second of three stretches, of A, A and J * O entries, whose letters are those of the stretch. An index
in a name (`experts.{e}.up.weight`) is either a dim of ours (`e D F`: our array stacks their E tensors) or an index in
our path (`fcs.{i}.kernel`). Sizes come from our shapes. Our dims must be those that the parameter declares
(`jax_moe/parameters.py`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

COUNTED = {"e": "E", "h": "H", "l": "L", "y": "Y"}  # our dims that are indices in names; l0, l1 ... if several stacks


@dataclass(frozen=True)
class Row:
    """A weight: its name and dims on their side, its path and dims on ours."""

    theirs: str
    their_dims: str
    ours: str
    our_dims: str


@dataclass(frozen=True)
class Constant:
    """A tensor of theirs that is no weight (a mask): written by us, checked on loading, absent from gradients.

    `value` computes it from the sizes of its dims; a letter's size and an index's range come from the rows.
    """

    theirs: str
    their_dims: str
    value: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Table:
    """A project's names for the weights of a module."""

    name: str
    rows: tuple[Row, ...]
    constants: tuple[Constant, ...] = ()
    numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # what an index prints, if not 0, 1, 2 ...


def words(dims: str) -> list[list[str]]:
    """The axes of `dims`, each the list of its words: "e (0/2 F) D" is [[e], [0/2, F], [D]]."""
    axes = re.findall(r"\([^()]*\)|[^\s()]+", dims)
    return [axis.strip("()").split() for axis in axes]


def part(word: str) -> tuple[int, int] | None:
    """(index, count) of a word like `0/2`; None for a letter."""
    found = re.fullmatch(r"(\d+)/(\d+)", word)
    return (int(found[1]), int(found[2])) if found else None


def stretch(word: str) -> tuple[int, list[list[str]]] | None:
    """(index, the letters of every stretch) of a word like `1|A+A+J*O`; None for another."""
    found = re.fullmatch(r"(\d+)\|([A-Z0-9+*]+)", word)
    return (int(found[1]), [each.split("*") for each in found[2].split("+")]) if found else None


def dim(word: str) -> str:
    """What a word of our dims means in the parameter's own dims: its letter, or the size of a part of a split dim."""
    fixed = part(word)
    return str(fixed[1]) if fixed else COUNTED.get(word.rstrip("0123456789"), word)


def name_indices(pattern: str) -> list[str]:
    """The letters in braces, in order."""
    return re.findall(r"\{(\w+)\}", pattern)


def under(rows: tuple[Row, ...], theirs: str, ours: str) -> tuple[Row, ...]:
    """The same rows for a module inside another, under these two prefixes."""
    return tuple(replace(row, theirs=theirs + row.theirs, ours=ours + row.ours) for row in rows)


def stacked(rows: tuple[Row, ...], theirs: str, ours: str, index: str) -> tuple[Row, ...]:
    """As `under`, for a list of modules that we stack: `index`, in braces in `theirs`, is our leading dim."""
    return tuple(replace(row, our_dims=f"{index} {row.our_dims}") for row in under(rows, theirs, ours))


def linear(theirs: str, ours: str, dims: str, kernel: str = "kernel", bias: str = "bias") -> tuple[Row, ...]:
    """torch.nn.Linear [out, in] and flax's kernel [in, out]; `dims` are the kernel's."""
    into, out = dims.split()
    weight = Row(f"{theirs}.weight", f"{out} {into}", f"{ours}{kernel}", dims)
    return weight, Row(f"{theirs}.bias", out, f"{ours}{bias}", out)


def layer_norm(theirs: str, ours: str, dim: str = "D") -> tuple[Row, ...]:
    """torch.nn.LayerNorm and flax's LayerNorm."""
    return Row(f"{theirs}.weight", dim, f"{ours}.scale", dim), Row(f"{theirs}.bias", dim, f"{ours}.bias", dim)


def embedding(theirs: str, ours: str, rows: str) -> Row:
    """torch.nn.Embedding and flax's Embed; `rows` is the letter of the table's length."""
    return Row(f"{theirs}.weight", f"{rows} D", f"{ours}.embedding", f"{rows} D")
