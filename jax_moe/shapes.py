"""What an array argument must look like, said by name: `mask_BT` is of booleans and has the B and T of `x_BTD`.

Names are role + dims, so a name says what is asked for. Standard library only, read by both frameworks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Kind = Literal["bool", "integer", "floating"]
# By the last word of a role; all others are numbers with a fraction.
KINDS: dict[str, Kind] = {
    "mask": "bool", "keep": "bool", "expert": "integer", "tokens": "integer", "position": "integer", "limit": "integer",
}


class Dim(NamedTuple):
    """The size of a dim and what says it."""

    size: int
    source: str  # an array, or a setting of the contract
    letter: str = ""  # the array's; none for a setting


Sizes = Mapping[str, Dim]  # by letter


def role_and_dims(name: str) -> tuple[str, str]:
    """("mask", "BT") of "mask_BT"; no dims for a scalar's name."""
    role, _, dims = name.rpartition("_")
    return (role, dims) if role and dims.isupper() else (name, "")


def kind_of(name: str) -> Kind:
    """What the array of that name holds."""
    return KINDS.get(role_and_dims(name)[0].rpartition("_")[2], "floating")


def dims_of(name: str, shape: Sequence[int]) -> dict[str, Dim]:
    """The dims of the array that others are held against. Raises ValueError for another number of dims than its name has."""
    dims = role_and_dims(name)[1]
    if len(shape) != len(dims):
        short = len(shape) == len(dims) - 1 and dims[0] == "B"
        hint = f"; {name}[None] is a batch of one" if short else ""
        raise ValueError(f"{name} has shape {tuple(shape)}: must have {len(dims)} dims [{', '.join(dims)}]{hint}")
    return {letter: Dim(size, name, letter) for letter, size in zip(dims, shape, strict=True)}


def dims_of_settings(config: Any, **names: str) -> dict[str, Dim]:
    """Dims that fields of a config say: E="num_experts"."""
    return {letter: Dim(getattr(config, name), name) for letter, name in names.items()}


def check_shape(name: str, shape: Sequence[int], sizes: Sizes, leading: str = "") -> None:
    """Raises ValueError "name has shape ...: must be ..., the B and T of x_BTD" unless every dim has its size.

    `leading` are dims before those of the name: the layers of a stack.
    """
    dims = [sizes[letter] for letter in leading + role_and_dims(name)[1]]
    wanted = tuple(dim.size for dim in dims)
    if tuple(shape) == wanted:
        return
    letters: dict[str, list[str]] = {}
    for dim in dims:
        letters.setdefault(dim.source, []).append(dim.letter)
    said = [f"the {_listed(found)} of {source}" if found[0] else source for source, found in letters.items()]
    raise ValueError(f"{name} has shape {tuple(shape)}: must be {wanted}{', ' if said else ''}{_listed(said)}")


def _listed(words: Sequence[str]) -> str:
    """"a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def check_width(name: str, width: int, model_dim: int) -> None:
    """Raises ValueError unless an input is model_dim wide."""
    if width != model_dim:
        raise ValueError(f"{name} has width {width}: must be model_dim={model_dim}")


def check_holds(name: str, dtype: object, holds: str) -> None:
    """Raises ValueError, with what may be meant, unless an array holds what its name says."""
    kind = kind_of(name)
    if holds == kind:
        return
    cure = {"integer": "cast it to integers", "floating": "cast it to the dtype that is to be computed in"}.get(kind, "")
    if kind == "bool":
        cure = f"{name} == 1 makes them of ones and zeros" + (f", {name} == 0 of an additive mask" if holds == "floating" else "")
    raise ValueError(f"{name} has dtype {str(dtype).removeprefix('torch.')}: must be {kind}; {cure}")


def check_choice_values(name: str, outside: Any, twice: Any, num_experts: int, top_k: int) -> None:
    """Raises ValueError if a token names an expert that is not there, or one expert twice."""
    if len(outside):
        raise ValueError(f"{name} names expert {int(outside[0])}: must be 0 to {num_experts - 1} (num_experts={num_experts})")
    if len(twice):
        raise ValueError(f"{name} names expert {int(twice[0])} twice for one token: must be {top_k} different experts a token")


def check_token_range(low: int, high: int, vocab_size: int) -> None:
    """Raises ValueError unless the lowest and the highest token are in the vocabulary."""
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token {low if low < 0 else high}: must be 0 to {vocab_size - 1} (vocab_size={vocab_size})")


def type_name(value: object) -> str:
    """"list", "numpy.ndarray", "torch.Tensor"."""
    kind = type(value)
    module = kind.__module__.split(".")[0]
    return kind.__qualname__ if module in ("builtins", "jaxlib", "jax") else f"{module}.{kind.__qualname__}"
