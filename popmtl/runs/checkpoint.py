"""Checkpoints `checkpoints/step-<n>/` of a run folder: a file for each subproblem, the course, and a manifest.

The manifest is written last, and lists every file with its size and SHA-256: a folder without one is no checkpoint, and
a file that differs from its entry makes it a damaged one, which is never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from popmtl.errors import RequestError
from popmtl.runs.files import replacing
from popmtl.runs.folder import RunFolder

VERSION = 2
MANIFEST, COURSE = "manifest.json", "course.json"


@dataclass(frozen=True)
class WrittenFile:
    """A file of a checkpoint: its name there, its size in bytes and the SHA-256 of its content."""

    name: str
    size: int
    sha256: str


def checkpoint_path(folder: RunFolder, step: int, generation: int = 0) -> Path:
    """Where the checkpoint of a step is.

    Args:
        folder: of the run.
        step: steps of both stages count.
        generation: how often actors were started before. An actor that was given up may still be writing when those
            that follow it come to the same step: they never write to the same place.
    """
    return folder.path / "checkpoints" / (f"step-{step:08d}" + (f"-{generation:04d}" if generation else ""))


def subproblem_file(subproblem: int) -> str:
    """The name of a subproblem's file in a checkpoint."""
    return f"subproblem-{subproblem:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> WrittenFile:
    """Writes tensors, and numbers as JSON beside them, to disk for good.

    Raises:
        OSError: the file cannot be written.
    """
    return _write(path, save(dict(tensors), {"format": "pt", "numbers": json.dumps(numbers)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        return tensors, json.loads(file.metadata()["numbers"])


def commit(path: Path, files: Sequence[WrittenFile], course: Mapping[str, Any]) -> None:
    """Makes a checkpoint of the files that the actors have written: from here on it counts.

    Raises:
        OSError: it cannot be written.
    """
    content = json.dumps({"version": VERSION, **course}, indent=1).encode()
    everything = [*files, _write(path / COURSE, content)]
    with replacing(path / MANIFEST) as beside:
        beside.write_text(json.dumps({"files": [asdict(file) for file in everything]}, indent=1), encoding="utf-8")
    _sync_folder(path)
    _sync_folder(path.parent)


def checkpoints(folder: RunFolder) -> list[Path]:
    """Committed checkpoints, the latest first."""
    return sorted((m.parent for m in folder.path.glob(f"checkpoints/step-*/{MANIFEST}")), reverse=True)


def damage(path: Path) -> str | None:
    """The first thing that is wrong with a checkpoint, naming the file; None if it is whole."""
    try:
        entries = [WrittenFile(**entry) for entry in json.loads((path / MANIFEST).read_bytes())["files"]]
    except FileNotFoundError:
        return f"{path / MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / MANIFEST} cannot be read: {error}"
    if not any(entry.name == COURSE for entry in entries):
        return f"{path / MANIFEST} does not list {COURSE}"
    for entry in entries:
        file = path / entry.name
        try:
            size = file.stat().st_size
            if size != entry.size:
                return f"{file} has {size} bytes, not {entry.size}"
            with file.open("rb") as stream:
                if _digest(stream) != entry.sha256:
                    return f"{file} is not what was written: its SHA-256 differs"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror or error}"
    return None


def last_whole(folder: RunFolder, complain: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The latest undamaged checkpoint and its course; None if there is none. Damage goes to `complain`."""
    for path in checkpoints(folder):
        if damaged := damage(path):
            complain(damaged)
            continue
        try:
            course = json.loads((path / COURSE).read_bytes())
            version = course["version"]
        except (OSError, ValueError, KeyError, TypeError):
            complain(f"{path / COURSE} is not a course of PopMTL")
            continue
        if version != VERSION:
            complain(f"{path / COURSE} is of version {version}, which this PopMTL does not read")
            continue
        return path, course
    return None


def last_of_run(folder: RunFolder, complain: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """As `last_whole`, but None only for a run that never had a checkpoint, and may begin again.

    Raises:
        RequestError: it had some, and none is whole; what is wrong with each, naming the file.
    """
    complaints: list[str] = []

    def hear(what: str) -> None:
        complaints.append(what)
        complain(what)

    if found := last_whole(folder, hear):
        return found
    names = {event.get("checkpoint", "") for event in folder.events() if event["kind"] == "checkpoint"}
    begun = sorted(name for name in names if (folder.path / "checkpoints" / name).is_dir())
    present = [path.name for path in checkpoints(folder)]
    complaints += [
        f"{folder.path / 'checkpoints' / name / MANIFEST} is missing" for name in begun if name not in present
    ]
    if names and not complaints:
        complaints = [f"{folder.path / 'checkpoints'} holds none of those that were written"]
    if complaints:
        raise RequestError(f"{folder.path}: no checkpoint is whole: {'; '.join(complaints)}")
    return None


def set_aside_after(folder: RunFolder, path: Path) -> None:
    """Lets damaged checkpoints after the one that the run goes on from count no more.

    What follows is written later than they were, and may be of earlier steps.
    """
    for later in checkpoints(folder):
        if later.name > path.name:
            os.replace(later / MANIFEST, later / f"{MANIFEST}.damaged")


def keep_last(folder: RunFolder, count: int) -> None:
    """Removes all but the last checkpoints, and what was begun and not committed before them."""
    kept = checkpoints(folder)[:count]
    for path in folder.path.glob("checkpoints/step-*"):
        if kept and path not in kept and path.name < kept[0].name:
            (path / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint must not count
            shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, content: bytes) -> WrittenFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_bytes(content)
    return WrittenFile(path.name, len(content), hashlib.sha256(content).hexdigest())


def _digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while part := stream.read(2**20):
        digest.update(part)
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    """Has the names in a folder on disk too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
