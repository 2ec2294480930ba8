"""Text from outside as it is shown: no control of the terminal, nothing that forges a line, and not without end."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

LONGEST_SHOWN = 100
"""Characters of a value in a message."""


def is_printable(text: str) -> bool:
    """Whether text has no control, format, bidirectional, private or unassigned characters, and no broken ones."""
    return all(character.isprintable() or unicodedata.category(character) == "Zs" for character in text)


def printable(text: str, keep: str = "") -> str:
    r"""The text with all that `is_printable` refuses as JSON escapes, such as `\u001b`: valid JSON stays so.

    Args:
        text: that came from outside, or contains something that did.
        keep: characters to leave as they are, such as line ends.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or is_printable(c) else json.dumps(c)[1:-1] for c in text)


def shown(value: Any, most: int = LONGEST_SHOWN) -> str:
    """A value in a message: as Python writes it, but printable and cut."""
    if isinstance(value, int) and abs(value) >= 10**most:  # Python itself refuses to write thousands of digits
        return f"a number of more than {most} digits"
    return cut(printable(repr(value)), most)


def cut(text: str, most: int) -> str:
    """The text, or its beginning and what is left out."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def in_bytes(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
