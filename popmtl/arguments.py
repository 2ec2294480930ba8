"""What arguments of the command line must be."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from popmtl.text import cut, printable, shown

LONGEST_MESSAGE = 4000
LONGEST_PATH = 4000
"""Bytes of a path or a name, somewhat less than systems take; an override may be longer."""

_HOST = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,252})"
_RAY = re.compile(rf"(ray://)?({_HOST}|\[[0-9A-Fa-f:.]{{2,45}}\]):([0-9]{{1,5}})")


class Parser(argparse.ArgumentParser):
    """Its complaints are short and printable, whatever was given."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        super().error(printable(cut(message, LONGEST_MESSAGE)))


def message(error: Exception) -> str:
    """What an error says: short, printable, and only its own further lines, which are indented, as lines."""
    return "\n".join(printable(line) for line in re.split(r"\n(?=  )", cut(str(error), LONGEST_MESSAGE)))


def check_texts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program, as `parser.error` does, where an argument is empty, not UTF-8, or cannot be a path."""
    for key, given in vars(options).items():
        name = f"--{key.replace('_', '-')}" if key not in ("config", "run", "runs", "job", "overrides") else key
        for text in given if isinstance(given, list) else [given]:
            if not isinstance(text, str):
                continue
            if not text:
                parser.error(f"{name}: is empty")
            if "\0" in text or not _is_utf8(text):
                parser.error(f"{name}: {shown(text)} is not UTF-8 text")
            if key not in ("overrides", "where") and "=" not in text and len(text.encode()) > LONGEST_PATH:
                parser.error(f"{name}: {shown(text)} is too long")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def steps(text: str) -> int:
    """A number of steps, at least 1."""
    return _whole(text, 1, 10**9, "a number of steps")


def port(text: str) -> int:
    """A port to listen at."""
    return _whole(text, 1, 65535, "a port from 1 to 65535")


def _whole(text: str, least: int, most: int, what: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)}: give {what}")
    return int(text)


def numbers(text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)}: give numbers between commas, such as 0.3,0.7") from error


def cluster_address(text: str) -> str:
    """The address of a running Ray."""
    found = _RAY.fullmatch(text)
    if text != "auto" and not (found and 0 < int(found[4]) <= 65535):
        raise argparse.ArgumentTypeError(f"{shown(text)}: give auto, HOST:PORT or ray://HOST:PORT of a running Ray")
    return text
