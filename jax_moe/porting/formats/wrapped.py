"""What trainers and wrappers put around a state dict: dictionaries, and prefixes of its names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

# Under these names people keep a state dict beside other things, the first one found counts.
KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim")  # and an optimizer's beside it
# Parts of a name that a wrapper adds wherever it stands: torch.compile, FSDP, activation checkpointing.
PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Prefixes that all names have in common: DataParallel, Lightning and the like.
PREFIXES = ("module.", "model.", "net.", "network.")

MOST = 8  # dictionaries, one in the other
Value = TypeVar("Value")


@dataclass(frozen=True)
class Opened:
    """What a trainer's dictionary holds."""

    state: Any  # of the model; the whole, where nothing was around it
    optimizer: Any  # its state dict, or None
    others: dict[Any, Any]  # what stood beside them
    within: str  # the keys on the way to the state

    @property
    def note(self) -> str | None:
        """What was opened and what stays behind, in words."""
        left = [] if self.optimizer is None else ["the optimizer's state"]
        left += sorted(str(name)[:40] for name in self.others)
        beside = f" (beside it: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''})" if left else ""
        return f'from "{self.within}" of a dictionary{beside}' if self.within else None


def open_dictionary(whole: Any) -> Opened:
    """The innermost dictionary under the usual names; `whole` itself if no usual name holds a dictionary."""
    within: list[str] = []
    optimizer, others = None, dict[Any, Any]()
    while isinstance(whole, Mapping) and len(within) < MOST:
        key = next((name for name in KEYS if isinstance(whole.get(name), Mapping)), None)
        if key is None:
            break
        words = OPTIMIZERS if optimizer is None else ()
        word = next((name for name in words if isinstance(whole.get(name), Mapping)), None)
        optimizer = whole[word] if word is not None else optimizer
        others |= {name: value for name, value in whole.items() if name not in (key, word)}
        within, whole = [*within, key], whole[key]
    return Opened(whole, optimizer, others, ".".join(within))


def unwrapped(whole: Any) -> Any:
    """The state dict alone."""
    return open_dictionary(whole).state


def own_names(names: Iterable[str], known: Callable[[set[str]], bool]) -> tuple[dict[str, str], list[str]]:
    """{name: the module's own}, and what wrappers had put there. `known` tells whether names make sense as they are.

    A prefix of all names goes only where what is left makes sense. Raises ValueError if two names meet.
    """
    state, taken = without_parts({name: name for name in names})
    short, outer = state, list[str]()
    while not known(set(short)):
        shorter = without_prefix(short)
        if shorter is None:
            return {long: name for name, long in state.items()}, taken
        short, outer = shorter[0], [*outer, shorter[1]]
    return {long: name for name, long in short.items()}, [*taken, *outer]


def without_parts(state: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """The state dict, wrapper parts removed from its names, and those parts. Raises ValueError if names collide."""
    found = sorted({part for name in state for part in PARTS if part in name.split(".")})
    named = {name: ".".join(part for part in name.split(".") if part not in PARTS) for name in state}
    if len(set(named.values())) < len(named):
        raise ValueError(f"{', '.join(found)}: two names are the same without it")
    return {named[name]: value for name, value in state.items()}, [f"{part}." for part in found]


def without_prefix(state: Mapping[str, Value]) -> tuple[dict[str, Value], str] | None:
    """The state dict without a prefix of PREFIXES that all its names have, and the prefix; None where there is none."""
    prefix = next((prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)), None)
    return None if prefix is None else ({name.removeprefix(prefix): value for name, value in state.items()}, prefix)
