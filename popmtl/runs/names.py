"""Names of runs: they are folders beside what a storage has of its own, and stand in tables and messages."""

from __future__ import annotations

from popmtl.errors import RequestError
from popmtl.text import is_printable, shown

OF_STORAGE = ("mlflow.db", "mlartifacts", "mlruns")
"""What MLflow keeps beside the runs, with files that begin with the name of its database; hidden files are ours."""

LONGEST = 255
"""Bytes of UTF-8, as file systems have it."""


def check_run_name(name: str, advice: str = "") -> str:
    """The name, if a new run can have it.

    Args:
        name: as it was given.
        advice: what to do, for a name that was not given as one.

    Raises:
        RequestError: it cannot be a folder's name, cannot be shown as it is, or is one that the storage uses itself.
    """
    if says := _no_name(name):
        raise RequestError(f"run name {shown(name)}: {says}{advice}")
    return name


def _no_name(name: str) -> str:
    if not is_printable(name):
        return "use printable characters only"
    if name in ("", ".", "..") or "/" in name:
        return "use a name that can be a folder's, without /"
    if name != name.strip():
        return "use a name without spaces at its ends"
    if name.startswith(".") or name.lower().startswith(OF_STORAGE):
        return f"hidden names, and those that begin with {', '.join(OF_STORAGE)}, are the storage's own"
    if len(name.encode()) > LONGEST:
        return f"use {LONGEST} bytes at most"
    return ""
