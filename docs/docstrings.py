"""For the site: docstrings as they are meant to be read, and the comments of fields as their descriptions.

A `*` in a docstring is a product and no emphasis, and lines after `>>>` are code.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

from parity_tests.repository.fields import field_comments


@cache
def comments_of(file: Path) -> dict[str, dict[str, str]]:
    """`field_comments` of a file."""
    return field_comments(file.read_text(encoding="utf-8"))


def as_markdown(text: str) -> str:
    """A docstring in which stars stay, and doctests are code."""
    text, *tests = re.split(r"(?m)^(?=>>> )", text, maxsplit=1)
    pieces = re.split(r"(`[^`]*`)", text)
    text = "".join(piece if piece[:1] == "`" else piece.replace("*", r"\*").replace("<", "&lt;") for piece in pieces)
    return text + "".join(f"```pycon\n{test.rstrip()}\n```\n" for test in tests)


class Docstrings(griffe.Extension):
    """Changes every docstring once, when its object is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Gives a field its comment, and other objects their docstring as markdown."""
        if obj.is_attribute and obj.docstring is None and obj.parent is not None and obj.parent.is_class:
            file = obj.filepath
            comment = comments_of(file).get(obj.parent.name, {}).get(obj.name) if isinstance(file, Path) else None
            if comment:
                obj.docstring = griffe.Docstring(comment, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
