"""Bounds of what the built-in problems take."""

from __future__ import annotations

from popmtl.errors import RequestError
from popmtl.text import shown

MOST_EXAMPLES = 2**20
"""Of a batch."""


def check_range(key: str, value: int, least: int, most: int) -> None:
    """Raises a RequestError that names the key where a value is out of its range, both ends of which belong to it."""
    if value < least:
        raise RequestError(f"{key} is {shown(value)}, and must be at least {least}")
    if value > most:
        raise RequestError(f"{key} is {shown(value)}, and must be at most {most:,}")
