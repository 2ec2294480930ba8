"""YAML as a config needs it: plain data from a bounded file, without the surprises of YAML 1.1.

Words, numbers in decimal digits, true, false and null are read as YAML 1.2's core schema has them; what YAML 1.1 takes
for another number (`0100`, `10:00`, `1_000`, `0x10`) is refused, so that it means nothing else to anyone. Custom tags,
merge keys, doubled keys and several documents are refused too; aliases count as what they stand for.
"""

from __future__ import annotations

import copy
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from popmtl.text import cut, shown

MOST_BYTES = 2**21
MOST_VALUES = 200_000
"""Of a file, aliases counted as what they stand for, and long text as several: a second's work."""
DEEPEST = 40
MOST_DIGITS = 40

_EVENTS = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_WORDS = {"": None, "~": None} | {
    form: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for form in (word, word.title(), word.upper())
}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SURPRISE = re.compile(
    r"[-+]?(0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+"  # other bases
    r"|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"  # to the base of 60
    r"|[0-9_]*[0-9]_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9_]+)?|[0-9]*\.[0-9]*_[0-9_]*([eE][-+]?[0-9_]+)?)"
)
_CONTROL = re.compile(r"[^\t\n -~\xa0-\ud7ff\ue000-\U0010ffff]")


# Quotes also what `read_yaml` would take for a number, or refuse, and PyYAML would not.
_Dumper: Any = type("_Dumper", (getattr(yaml, "CSafeDumper", yaml.SafeDumper),), {})
_Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"^({_FLOAT.pattern})$"), list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}int", re.compile(f"^({_SURPRISE.pattern})$"), list("-+.0123456789"))


def to_yaml(data: Mapping[str, Any]) -> str:
    """YAML that `read_yaml` reads as the same again.

    Raises:
        yaml.representer.RepresenterError: other than mappings, lists, strings, numbers, truth values and None.
        ValueError: text that is not UTF-8.
    """
    text: str = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_yaml_file(path: str | Path) -> Any:
    """The content of a file; see `read_yaml`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no regular file, or not such YAML.
    """
    # Looked at before it is opened: a device may do anything then, and a FIFO without a writer waits for one.
    _check_regular(os.stat(path).st_mode)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        _check_regular(os.fstat(file.fileno()).st_mode)
        return read_yaml(file.read(MOST_BYTES + 1))


def _check_regular(mode: int) -> None:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    if not stat.S_ISREG(mode):
        raise ValueError(f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, and must be a file")


def read_yaml(content: bytes | str) -> Any:
    """What a YAML document holds: dicts with strings as keys, lists, strings, numbers, truth values and None.

    Raises:
        ValueError: it is not YAML, holds something else, or more than a config has use for; the line is named.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"is larger than the {MOST_BYTES:,} bytes that a config may have")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        text.encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise ValueError("is not UTF-8 text") from error
    try:
        return _Reader(text).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"is not YAML: {where}{cut(error.problem or error.context or str(error), 200)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {cut(' '.join(str(error).split()), 200)}") from error


class _Reader:
    """Makes values of the parser's events, whose own composer has no bounds."""

    def __init__(self, text: str) -> None:
        self.events = yaml.parse(text, Loader=_EVENTS)
        self.anchors: dict[str, tuple[Any, int, int]] = {}
        self.count = 0
        self.deepest = 0

    def document(self) -> Any:
        value = None
        next(self.events)
        if isinstance(next(self.events), DocumentStartEvent):
            value = self.value(next(self.events), 0)
            while not isinstance(event := next(self.events), StreamEndEvent):
                if not isinstance(event, DocumentEndEvent):
                    raise _at(event, "a second document begins; a config is one")
        return value

    def value(self, event: Any, depth: int) -> Any:
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise _at(event, f"*{cut(str(event.anchor), 40)} stands for nothing that is complete before it")
            value, size, height = self.anchors[event.anchor]
            self.spend(event, size)
            self.descend(event, depth + height)
            return copy.deepcopy(value)  # an override of one must not change the other
        before, above = self.count, self.deepest
        self.spend(event, 1 + len(getattr(event, "value", "")) // 100)
        self.deepest = depth
        self.descend(event, depth)
        if isinstance(event, MappingStartEvent):
            _check_tag(event, "map")
            value = self.mapping(depth)
        elif isinstance(event, SequenceStartEvent):
            _check_tag(event, "seq")
            value = []
            while not isinstance(item := next(self.events), SequenceEndEvent):
                value.append(self.value(item, depth + 1))
        else:
            value = _scalar(event)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.count - before, self.deepest - depth
        self.deepest = max(above, self.deepest)
        return value

    def mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                raise _at(event, "a key must be a word")
            key = _scalar(event)
            if not isinstance(key, str):
                raise _at(event, f"the key {cut(event.value, 40) or 'null'} is no word: put it in quotes")
            if key == "<<" and event.implicit[0]:
                raise _at(event, "merge keys (<<) are not read: write the keys out")
            if key in found:
                raise _at(event, f"the key {shown(key)} stands there twice")
            found[key] = self.value(next(self.events), depth + 1)
        return found

    def descend(self, event: Any, depth: int) -> None:
        if depth > DEEPEST:
            raise _at(event, f"more than {DEEPEST} levels, one in the other, aliases counted as what they stand for")
        self.deepest = max(self.deepest, depth)

    def spend(self, event: Any, size: int) -> None:
        self.count += size
        if self.count > MOST_VALUES:
            raise _at(event, f"more than {MOST_VALUES:,} values, aliases counted as what they stand for")


def _at(event: Any, says: str) -> ValueError:
    return ValueError(f"line {event.start_mark.line + 1}: {says}")


def _check_tag(event: Any, kind: str) -> None:
    if event.tag not in (None, "!", f"{_TAG}{kind}"):
        tag = event.tag.replace(_TAG, "!!")
        raise _at(event, f"the tag {cut(tag, 60)} is not read: leave it away")


def _scalar(event: Any) -> Any:
    """A word or a number."""
    _check_tag(event, "str")
    text: str = event.value
    if found := _CONTROL.search(text):
        raise _at(event, f"{shown(text)} has a control character, {shown(found[0])}")
    if not event.implicit[0]:  # in quotes, as a block, or with a tag
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        digits = text.lstrip("+-")
        if len(digits) > MOST_DIGITS:
            raise _at(event, f"a number of {len(digits):,} digits; the longest have {MOST_DIGITS}")
        if digits[0] == "0" and len(digits) > 1:
            raise _at(event, f"{text} begins with 0: write {int(text)}, or put it in quotes if it is no number")
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise _at(event, f"{cut(text, 40)} is larger than any number of 64 bits")
        return number
    if found := _NO_NUMBER.fullmatch(text):
        return float(f"{found[1]}inf") if found[2] else math.nan
    if _SURPRISE.fullmatch(text):
        says = f"{cut(text, 40)} is a number to some readers of YAML, and not to others"
        raise _at(event, f"{says}: write it in plain digits, or put it in quotes if it is no number")
    return text
