"""The parity microscope: one batch in two frameworks, compared stage by stage.

Beside `jax_moe` and `torch_ref`, for it runs both. No torch is imported before a run needs it.

Your own modules: `compare_modules`; which convention differs: `explain`. Names and submodules load on first use.
"""

import importlib
import importlib.util
from typing import Any

_HOMES = {
    "Entry": "mapping", "permute": "mapping", "reshape": "mapping", "split": "mapping", "stacked": "mapping", "then": "mapping",
    "transpose": "mapping",
    "ModuleReport": "modules", "ModulesDifferError": "modules", "compare_modules": "modules",
    "Answer": "conventions.search", "Explanation": "conventions.search", "explain": "conventions.search",
    "in_words": "conventions.search",
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
