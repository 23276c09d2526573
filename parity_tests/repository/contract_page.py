"""The tables of docs/guides/contract.md: every field, its comment in the source, and which presets choose otherwise.

    python -m parity_tests.repository.contract_page --update
"""

import dataclasses
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jax_moe import presets
from jax_moe.config import moe
from parity_tests.repository.fields import field_comments

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "contract.md"
COMMENTS = field_comments((ROOT / "jax_moe" / "config" / "moe.py").read_text(encoding="utf-8"))
MARK = re.compile(r"(<!-- fields of (\w+): begin -->\n)(.*?)(<!-- fields of \2: end -->)", re.DOTALL)
PARTS = {"RouterConfig": "router", "CapacityConfig": "capacity", "ExpertConfig": "expert", "AroundConfig": "around",
         "BalanceConfig": "balance"}
# Sizes are each model's own, and which of a preset's options are switched on is its docstring's matter.
SIZES = {"model_dim", "expert_dim", "num_experts", "top_k"}


@cache
def choices() -> dict[str, Any]:
    """{preset: its contract} at the presets' own defaults."""
    return {name: getattr(presets, name)() for name in presets.__all__}


def part_of(contract: Any, kind: str) -> Any:
    """The part of a contract that is of this class; the contract itself for MoEConfig."""
    return contract if kind == "MoEConfig" else getattr(contract, PARTS[kind])


def table(kind: str) -> str:
    """One row for each field of a class."""
    rows = ["| field | default | what it decides | presets with another value |", "|---|---|---|---|"]
    cls = getattr(moe, kind)
    for field in dataclasses.fields(cls):
        if kind == "MoEConfig" and (field.name in SIZES or field.name in PARTS.values()):
            continue
        others = dict[str, list[str]]()
        for name, contract in choices().items():
            part = part_of(contract, kind)
            if part is not None and getattr(part, field.name) != field.default:
                others.setdefault(_shown(getattr(part, field.name)), []).append(name)
        chosen = "; ".join(f"{value}: {', '.join(names)}" for value, names in others.items())
        allowed = _allowed(cls, field.name)
        parts = COMMENTS[kind][field.name], f"One of {allowed}" if allowed else ""
        text = ". ".join(filter(None, parts)) or "-"
        rows.append(f"| `{field.name}` | {_shown(field.default)} | {_escaped(text)} | {chosen} |")
    return "\n".join(rows) + "\n"


def _allowed(cls: type, name: str) -> str:
    values = [value for value in get_args(get_type_hints(cls)[name]) if isinstance(value, str)]
    return ", ".join(f"`{value}`" for value in values)


def _shown(value: Any) -> str:
    return f"`{value!r}`".replace("'", '"')


def _escaped(text: str) -> str:
    return re.sub(r"([|*])", r"\\\1", text).replace("<", "&lt;")


def page(text: str) -> str:
    """The page with its tables written anew."""
    return MARK.sub(lambda found: f"{found[1]}{table(found[2])}{found[4]}", text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
