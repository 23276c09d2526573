"""Every setting is read: a field of a dataclass, of a contract or command line, that no code reads is an error."""

import ast
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax_moe", "torch_ref", "moe_parity", "moe_cli", "moe_train", "benchmarks")


def unread(trees: Iterable[ast.Module]) -> list[str]:
    """`Class.field` of every field that is read nowhere, neither as an attribute nor by its name in a string."""
    fields: dict[str, str] = {}
    read: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        decorators = " ".join(map(ast.unparse, getattr(node, "decorator_list", ())))
        if isinstance(node, ast.ClassDef) and "dataclass" in decorators:
            names = [ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)]
            fields |= {f"{node.name}.{name}": name for name in names}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            read.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            read.add(node.value)
    assert fields
    return [field for field, name in fields.items() if name not in read]


def test_every_setting_is_read() -> None:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert unread(ast.parse(file.read_text()) for file in files) == []


def test_a_setting_that_nobody_reads_is_found() -> None:
    code = "@dataclass(frozen=True)\nclass C:\n    a: int\n    b: int\n    c: int\nx.a\ngetattr(x, 'c')\nx.b = 1"
    assert unread([ast.parse(code)]) == ["C.b"]
