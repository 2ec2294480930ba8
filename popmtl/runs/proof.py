"""That a run's folder is the same one for the coordinator and for every actor, wherever they are.

A path may be there on every machine and shared by none. So the coordinator writes a file with a random token, which
every actor reads, and writes one of its own, which the coordinator reads. The token is in the names too: a network file
system may remember that a name was not there.
"""

from __future__ import annotations

from popmtl.errors import RunError
from popmtl.runs.folder import RunFolder
from popmtl.runs.storage import said, split

REMEDY = "use a path that all nodes share, or a URL (s3://…)"


def begin(folder: RunFolder, token: str) -> None:
    """Writes the coordinator's file.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.write(_file(token, "coordinator"), token.encode())
    except OSError as error:
        raise RunError(
            f"storage {split(folder.location)[0]}: the coordinator cannot write there: {said(error)}"
        ) from error


def answer(folder: RunFolder, token: str, rank: int) -> str | None:
    """Reads the coordinator's file and writes an actor's; what is wrong, if something is."""
    try:
        if folder.read(_file(token, "coordinator")) != token.encode():
            return "does not see there what the coordinator writes"
    except OSError as error:
        return f"does not see there what the coordinator writes ({said(error)})"
    try:
        folder.write(_file(token, f"actor-{rank}"), token.encode())
    except OSError as error:
        return f"cannot write there: {said(error)}"
    return None


def conclude(folder: RunFolder, token: str, rank: int, host: str, wrong: str | None) -> None:
    """Reads an actor's file.

    Args:
        folder: of the run.
        token: of this proof.
        rank: the actor's.
        host: where the actor is.
        wrong: what it answered.

    Raises:
        RunError: it is not there, or something else was wrong; the message names the actor, its host, and the storage.
    """
    if wrong is None:
        try:
            if folder.read(_file(token, f"actor-{rank}")) == token.encode():
                return
            wrong = "writes there what the coordinator does not see"
        except OSError as error:
            wrong = f"writes there what the coordinator does not see ({said(error)})"
    raise RunError(f"storage {split(folder.location)[0]}: actor {rank} on host {host} {wrong}; {REMEDY}")


def end(folder: RunFolder, token: str) -> None:
    """Removes the files."""
    folder.files.remove_folder(_folder(token))


def _folder(token: str) -> str:
    return f".proof-{token}"


def _file(token: str, writer: str) -> str:
    return f"{_folder(token)}/{writer}"
