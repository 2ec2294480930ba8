"""Writing files so that a reader finds either the old content or the whole new one."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to beside `path`, which it replaces when the block ends well, and only then.

    Raises:
        OSError: its folder is not there, or cannot be written to.
    """
    beside = path.with_name(f".{path.name}.part")
    beside.unlink(missing_ok=True)  # it may be a link, which nothing is to be written through
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def open_lock(path: Path) -> IO[bytes]:
    """A file to take locks on, which is made where it is missing.

    Raises:
        OSError: it cannot be made, or is a link, a pipe or another thing that is no file.
    """

    def check(mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"{path} is not a regular file")

    with suppress(FileNotFoundError):
        check(os.lstat(path).st_mode)
    # What it is by now is looked at, too; a pipe would keep who opens it waiting for another end.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o666), "rb")
    try:
        check(os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def to_json(value: Any, indent: int | None = None) -> str:
    """The value as strict JSON; NaN and infinities, which JSON has not, become null.

    Args:
        value: anything made of mappings, sequences, numbers, strings, None and numpy arrays or scalars.
        indent: as in `json.dumps`.

    Raises:
        TypeError: the value holds something else.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
