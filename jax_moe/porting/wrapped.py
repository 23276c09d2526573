"""What trainers and wrappers put around a state dict: dictionaries, and prefixes of its names."""

from collections.abc import Mapping
from typing import Any, TypeVar

# Under these names people keep a state dict beside other things, the first one found counts.
KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
# Parts of a name that a wrapper adds wherever it stands: torch.compile, FSDP, activation checkpointing.
PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Prefixes that all names have in common: DataParallel, Lightning and the like.
PREFIXES = ("module.", "model.", "net.", "network.")

Value = TypeVar("Value")


def unwrapped(whole: Any) -> Any:
    """The innermost dictionary under the usual names; what has other content than dictionaries there comes back as it is."""
    while isinstance(whole, Mapping):
        inner = next((whole[key] for key in KEYS if isinstance(whole.get(key), Mapping)), None)
        if inner is None:
            break
        whole = inner
    return whole


def without_parts(state: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """The state dict without the parts of wrappers in its names, and which they were. Raises ValueError if two names meet."""
    found = sorted({part for name in state for part in PARTS if part in name.split(".")})
    named = {name: ".".join(part for part in name.split(".") if part not in PARTS) for name in state}
    if len(set(named.values())) < len(named):
        raise ValueError(f"{', '.join(found)}: two names are the same without it")
    return {named[name]: value for name, value in state.items()}, [f"{part}." for part in found]


def without_prefix(state: Mapping[str, Value]) -> tuple[dict[str, Value], str] | None:
    """The state dict without a prefix of PREFIXES that all its names have, and the prefix; None where there is none."""
    prefix = next((prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)), None)
    return None if prefix is None else ({name.removeprefix(prefix): value for name, value in state.items()}, prefix)
