"""Text as a page can show it: what has no shape of its own, or changes the text around it, is written out."""

import unicodedata

JOINERS = "\u200c\u200d"  # inside words and emoji


def visible(text: str) -> str:
    """The text with control characters, marks that turn its direction, and halves of characters written out.

    A new line is shown by an arrow and kept; a space and a tab stay as they are.
    """
    return "".join(map(_shown, text))


def named(text: str) -> str:
    """The text on one line, in quotes, for a tooltip or a table."""
    return f"'{visible(text).replace(chr(10), '').replace(chr(9), chr(0x2409))}'"


def _shown(character: str) -> str:
    if character == "\n":
        return "\u21b5\n"
    if character == "\t" or character in JOINERS:
        return character
    if ord(character) < 32 or ord(character) == 127:  # the picture of a control character
        return chr(0x2421 if ord(character) == 127 else 0x2400 + ord(character))
    kind = unicodedata.category(character)
    return f"[U+{ord(character):04X}]" if kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else character
