"""The comments of a dataclass's fields, from its source: what stands above a field, and behind it. Standard library."""

import ast
import re


def field_comments(source: str) -> dict[str, dict[str, str]]:
    """{class: {field: its comment, on one line}} of all classes at the top of a source; "" for none."""
    lines = source.splitlines()
    return {
        node.name: {
            field.target.id: _comment(lines, field.lineno - 1, (field.end_lineno or field.lineno) - 1)
            for field in node.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        for node in ast.parse(source).body if isinstance(node, ast.ClassDef)
    }


def _comment(lines: list[str], first: int, last: int) -> str:
    above, i = list[str](), first - 1
    while i >= 0 and re.fullmatch(r"\s*#.*", lines[i]):
        above.insert(0, lines[i].strip().removeprefix("#").strip())
        i -= 1
    behind = re.search(r"  # (.*)$", lines[last])
    return "; ".join(part for part in (" ".join(above), behind[1] if behind else "") if part)
