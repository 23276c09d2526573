"""Kind and shape of array arguments, as their names say: `mask_BT` holds booleans and has the B and T of `x_BTD`.

A name is role + dims. Standard library only, used by both frameworks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Kind = Literal["bool", "integer", "floating"]
# By the last word of the role; every other role is floating.
KINDS: dict[str, Kind] = {
    "mask": "bool", "keep": "bool", "expert": "integer", "tokens": "integer", "target": "integer",
    "position": "integer", "limit": "integer",
}


class Dim(NamedTuple):
    """The size of a dim and where it comes from."""

    size: int
    source: str  # name of an array, or of a field of the contract
    letter: str = ""  # the dim's letter in the array's name; none for a field


Sizes = Mapping[str, Dim]  # by letter


def role_and_dims(name: str) -> tuple[str, str]:
    """("mask", "BT") for "mask_BT"; the name of a scalar has no dims."""
    role, _, dims = name.rpartition("_")
    return (role, dims) if role and dims.isupper() else (name, "")


def kind_of(name: str) -> Kind:
    """The kind of values in an array of this name."""
    return KINDS.get(role_and_dims(name)[0].rpartition("_")[2], "floating")


def dims_of(name: str, shape: Sequence[int]) -> dict[str, Dim]:
    """{letter: dim} of an array. Raises ValueError if its rank is not that of its name."""
    dims = role_and_dims(name)[1]
    if len(shape) != len(dims):
        short = len(shape) == len(dims) - 1 and dims[0] == "B"
        hint = f"; {name}[None] is a batch of one" if short else ""
        raise ValueError(f"{name} has shape {tuple(shape)}: must have {len(dims)} dims [{', '.join(dims)}]{hint}")
    return {letter: Dim(size, name, letter) for letter, size in zip(dims, shape, strict=True)}


def dims_of_settings(config: Any, **names: str) -> dict[str, Dim]:
    """{letter: dim} from fields of a config, given as E="num_experts"."""
    return {letter: Dim(getattr(config, name), name) for letter, name in names.items()}


def check_shape(name: str, shape: Sequence[int], sizes: Sizes, leading: str = "") -> None:
    """Raises ValueError "name has shape ...: must be ..., the B and T of x_BTD" unless every dim has its size.

    `leading` are letters of dims before those of the name, such as L for a stack of layers.
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
    """Raises ValueError unless the width of an input is model_dim."""
    if width != model_dim:
        raise ValueError(f"{name} has width {width}: must be model_dim={model_dim}")


def check_holds(name: str, dtype: object, holds: str) -> None:
    """Raises ValueError, with advice, unless an array holds the kind of its name."""
    kind = kind_of(name)
    if holds == kind:
        return
    cure = {"integer": "cast it to integers", "floating": "cast it to the dtype to compute in"}.get(kind, "")
    if kind == "bool":
        cure = f"{name} == 1 converts ones and zeros"
        cure += f", {name} == 0 an additive mask" if holds == "floating" else ""
    raise ValueError(f"{name} has dtype {str(dtype).removeprefix('torch.')}: must be {kind}; {cure}")


def check_choice_values(name: str, outside: Any, twice: Any, num_experts: int, top_k: int) -> None:
    """Raises ValueError for a choice outside 0 to num_experts - 1, or for one expert chosen twice by a token."""
    if len(outside):
        allowed = f"0 to {num_experts - 1} (num_experts={num_experts})"
        raise ValueError(f"{name} names expert {int(outside[0])}: must be {allowed}")
    if len(twice):
        allowed = f"{top_k} different experts per token"
        raise ValueError(f"{name} names expert {int(twice[0])} twice for one token: must be {allowed}")


def check_table(table_tokens: int, has_tokens: bool, has_choices: bool) -> None:
    """Raises ValueError unless a layer has tokens or choices where a table chooses, and no tokens elsewhere."""
    if table_tokens and not (has_tokens or has_choices):
        raise ValueError(f"tokens_BT=None: must be given: a table of {table_tokens} tokens chooses their experts")
    if has_tokens and not table_tokens:
        raise ValueError("tokens_BT: must be None where no table of tokens chooses (table_tokens=0)")


def check_state(takes_state: bool, given: bool) -> None:
    """Raises ValueError for a router's state where the router takes none."""
    if given and not takes_state:
        raise ValueError("router_state_BTI: must be None where the router takes no state (takes_state=False)")


def check_token_range(
    low: int, high: int, vocab_size: int, where: str = "", place: Callable[[int], str] | None = None
) -> None:
    """Raises ValueError unless the lowest and the highest token are in the vocabulary.

    `where` begins the message; `place` says where a token stands.
    """
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        at = "" if place is None else f" ({place(bad)})"
        raise ValueError(f"{where}token {bad}{at}: must be 0 to {vocab_size - 1} (vocab_size={vocab_size})")


def type_name(value: object) -> str:
    """"list", "numpy.ndarray", "torch.Tensor"."""
    kind = type(value)
    module = kind.__module__.split(".")[0]
    return kind.__qualname__ if module in ("builtins", "jaxlib", "jax") else f"{module}.{kind.__qualname__}"
