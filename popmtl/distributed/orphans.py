"""Processes that an actor forks, such as those of a DataLoader, end with it.

They hold its connections: as long as one of them lives, Ray does not see that the actor has died. torch's own workers
look for their parent, but one that was being made when the parent was killed takes another process for it.
"""

from __future__ import annotations

import functools
import os
import threading
import time

LOOK_SECONDS = 1.0
"""Between two looks of a forked process for its parent."""


@functools.cache  # once a process
def end_forks_with_their_parents() -> None:
    """Lets every process that this one forks from now on, and those that they fork, end where its parent has."""
    parent = os.getpid()

    def note() -> None:
        nonlocal parent
        parent = os.getpid()

    def start() -> None:
        threading.Thread(target=_end_without, args=[parent], name="looks for the parent", daemon=True).start()

    os.register_at_fork(before=note, after_in_child=start)


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)
