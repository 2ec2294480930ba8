"""The two ways in which PopMTL says no, which the command line turns into exit codes, and how it helps along."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_NAME = 200
"""What is compared of a name: the time goes with the square of it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean …?` for a name that is close to a known one, or nothing."""
    match = difflib.get_close_matches(name[:LONGEST_NAME], list(known), n=1)
    return f": did you mean {match[0]}?" if match else ""


class RequestError(ValueError):
    """A request that cannot be carried out as it stands: a bad config, problem or path. Exit code 2."""


class FileDamaged(RequestError):  # noqa: N818  # it says what happened
    """A file of a run folder, or a line of it, is not what PopMTL writes there; the message names it."""


class RunError(RuntimeError):
    """A run that started and failed. Exit code 1."""


class NoRoom(RunError):  # noqa: N818  # it says what happened
    """The cluster has no room for the actors."""


class ActorLost(RunError):  # noqa: N818  # it says what happened
    """An actor died, or did not answer in time: the run can go on from its last checkpoint."""


class CheckpointDamaged(RunError):  # noqa: N818
    """A file of a checkpoint is not what was written: the run can go on from one before it."""
