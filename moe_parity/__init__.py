"""The parity microscope: one batch in JAX and PyTorch, compared stage by stage.

`compare_modules` compares a user's own modules; `explain` names the convention that differs. Names and submodules load
on first use, PyTorch when a comparison runs.
"""

import importlib
import importlib.util
from typing import Any

_HOMES = {
    **dict.fromkeys(("Entry", "permute", "reshape", "split", "stacked", "then", "transpose"), "mapping"),
    **dict.fromkeys(("ModuleReport", "ModulesDifferError", "compare_modules"), "modules"),
    **dict.fromkeys(("Answer", "Explanation", "explain", "in_words"), "explanation.search"),
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"moe_parity.{_HOMES[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"moe_parity.{name}") is not None:
        value = importlib.import_module(f"moe_parity.{name}")
    else:
        raise AttributeError(f"module 'moe_parity' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
