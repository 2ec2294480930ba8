"""One process at a time in a folder of a storage without locks: a file that its owner goes on renewing.

Who wants the folder reads the file, waits for longer than any renewal takes, and reads it again: unchanged, its owner
is gone. Only durations are compared, by the clock of who waits, so that clocks may differ and jump.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from uuid import uuid4

from popmtl.errors import FileDamaged, RunError
from popmtl.runs.records import Lease, parse
from popmtl.runs.storage import Storage

NAME = ".lock"
RENEW_SECONDS = 3.0
WAIT_SECONDS = 15.0
"""After so many seconds without a renewal the owner is gone; some of its writes may fail, or take long."""

SETTLE_SECONDS = 2.0
"""Of two who take the lease at once, the one that wrote last has it: the other reads that, so much later."""


LOST = signal.SIGUSR1
"""Wakes the main thread of who lost a lease. Not SIGINT, which a command in the background ignores."""


@contextmanager
def lease(files: Storage) -> Iterator[None]:
    """Holds the lease of a folder.

    Taken in the main thread, that is interrupted if another process takes the lease; that one could have
    found it unchanged if this process was stopped, or could not reach the storage, for a while.

    Raises:
        BlockingIOError: another process holds it.
        RunError: another process took it.
    """
    me = uuid4().hex
    if leased([files])[0]:
        raise BlockingIOError
    _renew(files, me, 0)
    time.sleep(SETTLE_SECONDS)
    if _owner(_content(files)) != me:
        raise BlockingIOError
    end, lost, main = threading.Event(), threading.Event(), threading.main_thread()
    interruptible = threading.current_thread() is main
    if interruptible:
        previous = signal.signal(LOST, signal.default_int_handler)

    def keep() -> None:
        count = 0
        while not end.wait(RENEW_SECONDS):
            with suppress(OSError):  # it tries again
                if _owner(_content(files)) not in (me, None):
                    lost.set()
                    if interruptible and main.ident:
                        signal.pthread_kill(main.ident, LOST)
                    return
                count += 1
                _renew(files, me, count)

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise RunError(f"{files.location}: another process has taken this run over") from None
        raise
    finally:
        end.set()
        thread.join()
        if interruptible:
            signal.signal(LOST, previous)
        if not lost.is_set():
            with suppress(OSError):  # whoever comes next waits, then
                files.remove(NAME)


def leased(folders: Sequence[Storage]) -> list[bool]:
    """Whether a process holds the lease of each folder; waits once for all of them, and not where there are none."""
    first = [_content(files) for files in folders]
    held = [False] * len(folders)
    asked = [i for i, content in enumerate(first) if content is not None]
    deadline = time.monotonic() + WAIT_SECONDS
    while asked and time.monotonic() < deadline:
        time.sleep(min(1.0, RENEW_SECONDS))
        now = {i: _content(folders[i]) for i in asked}
        for i in asked:
            held[i] = now[i] not in (first[i], None)
        asked = [i for i in asked if now[i] == first[i]]
    return held


def _renew(files: Storage, owner: str, count: int) -> None:
    files.write(NAME, json.dumps({"owner": owner, "count": count}).encode())


def _content(files: Storage) -> bytes | None:
    try:
        return files.read(NAME)
    except FileNotFoundError:
        return None


def _owner(content: bytes | None) -> str | None:
    """Who has the lease; None where nobody has, or what is there does not tell."""
    try:
        return str(parse(Lease, content, NAME)["owner"]) if content else None
    except FileDamaged:
        return None
