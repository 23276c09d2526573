"""A hook of mkdocs: pages link to README.md, which is no page of the site; there the first page stands for it."""

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with links to the first page of the site in place of README.md."""
    return markdown.replace("](../README.md)", "](index.md)")
