"""Actors that do not all see the same storage, for the tests, which Ray's workers import by name."""

import ctypes
import functools
import os

import ray

from popmtl.distributed import coordinator
from popmtl.distributed.subproblem import SubproblemActor

CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def cover(path):
    """Mounts an empty file system over a folder, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        or libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=1m")
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Apart(SubproblemActor):
    """The second one has a storage of its own under the same path, as on a machine that does not share it."""

    def prove_storage(self, folder, token):
        if self.rank == 1:
            cover(folder.path.parent)
        return super().prove_storage(folder, token)


class Coordinator(coordinator.Coordinator):
    """Starts those."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        coordinator.Crew.start = functools.partial(coordinator.Crew.start, actor=ray.remote(Apart))
