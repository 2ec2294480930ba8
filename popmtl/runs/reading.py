"""Reading the files of a run folder, whatever they hold: JSON through its schema, and nothing without an end."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from popmtl.errors import FileDamaged
from popmtl.runs.records import FILE_BYTES, Line, parse
from popmtl.runs.storage import Storage

TAIL_BYTES = 2**16
"""What is read first of a file whose last lines are asked for."""

MOST_DAMAGED = 10_000
"""A file with more damaged lines is refused as a whole."""

SAID = 5
"""So many damaged lines of a file are named."""


def few(complaints: Sequence[str]) -> list[str]:
    """The first of them, and how many more there are: a file may have no line that is not damaged."""
    more = len(complaints) - SAID
    return [*complaints[:SAID], *([f"and {more} more lines of this file"] if more > 0 else [])]


def passing_over(what: str) -> None:
    """Is told what is damaged, where somebody else says so."""


class Reading:
    """Of a run folder, how its files are read; lines that wait to be written count as there."""

    files: Storage
    _waiting: dict[str, bytes]
    _gathering: threading.Lock
    _writing: threading.RLock

    def read(self, name: str) -> bytes:
        """The content of a file of the folder.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.files.read(name)

    def lines(
        self, name: str, schema: Any = Line, complain: Callable[[str], None] | None = None
    ) -> list[dict[str, Any]]:
        """The records of a file of JSON lines in the order of writing; none where there is no file.

        Without a newline at its end the last line is one that a crash cut short, and no record.

        Args:
            name: of the file.
            schema: of a line, one of `popmtl.runs.records`.
            complain: is told of what is damaged, which is then passed over; without it, that is an error.

        Raises:
            FileDamaged: a line is damaged; the message has its number.
        """
        judged = self.judged_lines(name, schema)
        damaged = [record for record in judged if isinstance(record, FileDamaged)]
        if damaged and complain is None:
            raise damaged[0]
        for what in few([str(error) for error in damaged]):
            assert complain is not None  # or the first was raised
            complain(what)
        return [record for record in judged if not isinstance(record, FileDamaged)]

    def judged_lines(self, name: str, schema: Any) -> list[dict[str, Any] | FileDamaged]:
        """As `lines`, with what is wrong with a damaged line in its place."""
        with self._writing:
            try:
                return [record for _, record in self.judged(name, schema)]
            except FileDamaged as error:  # of the file as a whole
                return [error]

    def last(
        self, name: str, schema: Any, wanted: Callable[[dict[str, Any]], bool] | None = None
    ) -> dict[str, Any] | None:
        """The last of the records, or of those that are wanted, without reading what stands before; None without one.

        Raises:
            FileDamaged: a line after it is damaged.
        """
        with self._writing:
            for length in (TAIL_BYTES, FILE_BYTES):
                whole, lines = self._tail(name, length)
                try:
                    for line in reversed(lines):
                        record: dict[str, Any] = parse(schema, line, name)
                        if wanted is None or wanted(record):
                            return record
                except FileDamaged:
                    break  # read from its beginning, the file tells which line it is
                if whole:
                    return None
            return next(
                (record for record in reversed(self.lines(name, schema)) if wanted is None or wanted(record)), None
            )

    def _tail(self, name: str, length: int) -> tuple[bool, list[bytes]]:
        """The whole lines in the last bytes of a file, and of those that wait; and whether these are all."""
        with self._gathering:
            waiting = self._waiting.get(name, b"")
        try:
            with self._open(name) as stream:
                end = stream.seek(0, os.SEEK_END)
                start = max(0, end - length)
                stream.seek(start)
                content = stream.read(length)
        except FileNotFoundError:
            start, content = 0, b""
        lines = (content[: content.rfind(b"\n") + 1] + waiting).split(b"\n")[:-1]
        return start == 0, lines if start == 0 else lines[1:]

    def _lines(self, name: str) -> Iterator[bytes]:
        """The lines of a file, and those that wait, each with its newline."""
        with self._gathering:
            waiting = self._waiting.get(name, b"")
        with suppress(FileNotFoundError), self._open(name) as stream:
            lines = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream)))
            while line := lines.readline(FILE_BYTES):
                if line.endswith(b"\n"):
                    yield line
                elif len(line) == FILE_BYTES:
                    raise FileDamaged(f"{self.files.where(name)} is damaged: it has a line of {FILE_BYTES} bytes")
        yield from waiting.splitlines(keepends=True)

    def judged(self, name: str, schema: Any) -> Iterator[tuple[bytes, dict[str, Any] | FileDamaged]]:
        """The lines of a file, each with its record, or with what is wrong with it.

        Raises:
            FileDamaged: it is no file, has a line of more than FILE_BYTES, or more than MOST_DAMAGED damaged ones.
        """
        where, damaged = self.files.where(name), 0
        for number, line in enumerate(self._lines(name), 1):
            try:
                record: dict[str, Any] | FileDamaged = parse(schema, line, f"{where}, line {number}")
            except FileDamaged as error:
                record, damaged = error, damaged + 1
                if damaged > MOST_DAMAGED:
                    raise FileDamaged(f"{where} is damaged: more than {MOST_DAMAGED} lines of it are") from error
            yield line, record

    def record(self, name: str, schema: Any) -> Any:
        """A JSON file of the folder, as its schema has it.

        Raises:
            FileNotFoundError: there is none.
            FileDamaged: it is something else.
        """
        return parse(schema, self.bounded(name), f"{self.files.where(name)} is damaged")

    def bounded(self, name: str, limit: int = FILE_BYTES) -> bytes:
        """The content of a file of the folder that has at most so many bytes.

        Raises:
            FileNotFoundError: there is none.
            FileDamaged: it has more, or is no file.
        """
        with self._open(name) as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise FileDamaged(f"{self.files.where(name)} is damaged: it has more than {limit} bytes")
        return content

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        """A file of the folder, and never a pipe or a device, which may have no end.

        Raises:
            FileNotFoundError: there is none.
            FileDamaged: it is no file.
        """
        if self.files.entry(name) is None:
            folder, _, last = name.rpartition("/")
            where = self.files.where(name)
            if last in self.files.children(folder):
                raise FileDamaged(f"{where} is damaged: it is not a regular file")
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where)
        with self.files.open(name) as stream:
            yield stream
