"""Checkpoints `checkpoints/step-<n>/` of a run folder: a file for each subproblem, the course, and a manifest.

The manifest is written last, and lists every file with its size and SHA-256: a folder without one is no checkpoint, and
a file that differs from its entry makes it a damaged one, which is never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from safetensors.torch import load, save
from torch import Tensor

from popmtl.errors import CheckpointDamaged, RequestError
from popmtl.method.front import Hypervolume
from popmtl.runs.folder import RunFolder
from popmtl.runs.storage import PART_BYTES, said

VERSION = 3
MANIFEST, COURSE = "manifest.json", "course.json"


@dataclass(frozen=True)
class WrittenFile:
    """A file of a checkpoint: its name there, its size in bytes and the SHA-256 of its content."""

    name: str
    size: int
    sha256: str


def checkpoint_name(step: int, generation: int = 0) -> str:
    """The folder, in that of the run, of a checkpoint.

    Args:
        step: steps of both stages count.
        generation: how often actors were started before. An actor that was given up may still be writing when those
            that follow it come to the same step: they never write to the same place.
    """
    return f"checkpoints/step-{step:08d}" + (f"-{generation:04d}" if generation else "")


def subproblem_file(subproblem: int) -> str:
    """The name of a subproblem's file in a checkpoint."""
    return f"subproblem-{subproblem:05d}.safetensors"


def write_tensors(
    folder: RunFolder, name: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> WrittenFile:
    """Writes tensors, and numbers as JSON beside them, to a file of a run's folder, for good.

    Raises:
        OSError: the file cannot be written.
    """
    return _write(folder, name, save(dict(tensors), {"format": "pt", "numbers": json.dumps(numbers)}))


def read_tensors(folder: RunFolder, checkpoint: str, file: WrittenFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote to a file of a checkpoint; read once, and compared with its entry in the manifest.

    Raises:
        CheckpointDamaged: it is something else, or cannot be read.
    """
    where = folder.files.where(f"{checkpoint}/{file.name}")
    try:
        content = folder.read(f"{checkpoint}/{file.name}")
    except OSError as error:
        raise CheckpointDamaged(f"{where} cannot be read: {said(error)}") from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise CheckpointDamaged(_differs(where))
    length = int.from_bytes(content[:8], "little")  # of the header that safetensors begin with
    return load(content), json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["numbers"])


def commit(folder: RunFolder, checkpoint: str, files: Sequence[WrittenFile], course: Mapping[str, Any]) -> None:
    """Makes a checkpoint of the files that the actors have written: from here on it counts.

    Raises:
        OSError: it cannot be written.
    """
    # A run that goes on from here does not write the lines from before it again.
    folder.flush()
    content = json.dumps({"version": VERSION, **course}, indent=1).encode()
    everything = [*files, _write(folder, f"{checkpoint}/{COURSE}", content)]
    manifest = json.dumps({"files": [asdict(file) for file in everything]}, indent=1)
    folder.write(f"{checkpoint}/{MANIFEST}", manifest.encode())
    folder.files.sync(checkpoint)
    folder.files.sync("checkpoints")


def checkpoints(folder: RunFolder) -> list[str]:
    """Committed checkpoints, the latest first."""
    return sorted((name for name in _begun(folder) if folder.files.entry(f"{name}/{MANIFEST}")), reverse=True)


def damage(folder: RunFolder, checkpoint: str, *, contents: bool = True) -> str | None:
    """The first thing that is wrong with a checkpoint, naming the file; None if it is whole.

    Args:
        folder: of the run.
        checkpoint: its name there.
        contents: read every file; otherwise only the sizes of the subproblems' files are looked at.
    """
    try:
        entries = files_of(folder, checkpoint)
    except FileNotFoundError:
        return f"{folder.files.where(f'{checkpoint}/{MANIFEST}')} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder.files.where(f'{checkpoint}/{MANIFEST}')} cannot be read: {error}"
    if not any(entry.name == COURSE for entry in entries):
        return f"{folder.files.where(f'{checkpoint}/{MANIFEST}')} does not list {COURSE}"
    for entry in entries:
        name = f"{checkpoint}/{entry.name}"
        where = folder.files.where(name)
        try:
            found = folder.files.entry(name)
            if found is None:
                return f"{where} is missing"
            if found.size != entry.size:
                return f"{where} has {found.size} bytes, not {entry.size}"
            if contents or entry.name == COURSE:
                with folder.files.open(name) as stream:
                    if _digest(stream) != entry.sha256:
                        return _differs(where)
        except OSError as error:
            return f"{where} cannot be read: {said(error)}"
    return None


def files_of(folder: RunFolder, checkpoint: str) -> list[WrittenFile]:
    """The files that the manifest of a checkpoint lists."""
    manifest = json.loads(folder.read(f"{checkpoint}/{MANIFEST}"))
    return [WrittenFile(**entry) for entry in manifest["files"]]


def last_whole(
    folder: RunFolder, complain: Callable[[str], None], *, contents: bool = True
) -> tuple[str, dict[str, Any]] | None:
    """The latest undamaged checkpoint and its course; None if there is none.

    Args:
        folder: of the run.
        complain: is told what is damaged.
        contents: as in `damage`.
    """
    for checkpoint in checkpoints(folder):
        if damaged := damage(folder, checkpoint, contents=contents):
            complain(damaged)
            continue
        where = folder.files.where(f"{checkpoint}/{COURSE}")
        try:
            course = json.loads(folder.read(f"{checkpoint}/{COURSE}"))
            version = course["version"]
        except (OSError, ValueError, KeyError, TypeError):
            complain(f"{where} is not a course of PopMTL")
            continue
        if version != VERSION:
            complain(
                f"{where} is of version {version}, and this PopMTL reads version {VERSION}: it keeps other things of "
                "optimizers and data; finish the run by the PopMTL that began it, or train anew"
            )
            continue
        return checkpoint, course
    return None


def last_of_run(
    folder: RunFolder, complain: Callable[[str], None], *, contents: bool = True
) -> tuple[str, dict[str, Any]] | None:
    """As `last_whole`, but None only for a run that never had a checkpoint, and may begin again.

    Raises:
        RequestError: it had some, and none is whole; what is wrong with each, naming the file.
    """
    complaints: list[str] = []

    def hear(what: str) -> None:
        complaints.append(what)
        complain(what)

    if found := last_whole(folder, hear, contents=contents):
        return found
    committed = {event.get("checkpoint", "") for event in folder.events() if event["kind"] == "checkpoint"}
    lacking = (committed & set(_begun(folder))) - set(checkpoints(folder))
    complaints += [f"{folder.files.where(f'{name}/{MANIFEST}')} is missing" for name in sorted(lacking)]
    if committed and not complaints:
        complaints = [f"{folder.files.where('checkpoints')} holds none of those that were written"]
    if complaints:
        raise RequestError(f"{folder.location}: no checkpoint is whole: {'; '.join(complaints)}")
    return None


def set_aside(folder: RunFolder, checkpoint: str) -> None:
    """Lets a damaged checkpoint count no more; its files stay.

    Raises:
        OSError: its manifest cannot be renamed.
    """
    manifest = f"{checkpoint}/{MANIFEST}"
    folder.write(f"{manifest}.damaged", folder.read(manifest))
    folder.files.remove(manifest)


def keep_last(folder: RunFolder, count: int, *, best: bool = False) -> None:
    """Removes all but the last checkpoints, and what was begun and not committed before them.

    Args:
        folder: of the run.
        count: of the last ones, at least 1.
        best: keep the one with the largest hypervolume too, of several the latest.

    What is to become a front of its own (`front.best`), as those that stay know, stays too.
    """
    found = checkpoints(folder)
    kept = found[:count]
    # A run that goes on from one of them needs the best one that was before it.
    for step in {course_of(folder, checkpoint).get("best") for checkpoint in kept}:
        kept += checkpoints_at(folder, step) if isinstance(step, int) else []
    if best and found:
        volumes = {checkpoint: hypervolume_of(folder, checkpoint) for checkpoint in found}
        kept.append(max(found, key=lambda checkpoint: volume.value if (volume := volumes[checkpoint]) else -math.inf))
    for checkpoint in _begun(folder):
        if kept and checkpoint not in kept and checkpoint < kept[0]:
            discard(folder, checkpoint)


def checkpoints_at(folder: RunFolder, step: int) -> list[str]:
    """The committed checkpoints of a step, the latest first: the same rows, by the actors of different starts."""
    name = checkpoint_name(step)
    return [found for found in checkpoints(folder) if found == name or found.startswith(f"{name}-")]


def hypervolume_of(folder: RunFolder, checkpoint: str) -> Hypervolume | None:
    """The hypervolume of the last evaluation before a checkpoint; None where its course cannot be read."""
    course = course_of(folder, checkpoint)
    try:
        return Hypervolume(float(course["hypervolume"]), course.get("hypervolume_error"))
    except (ValueError, KeyError, TypeError):
        return None


def course_of(folder: RunFolder, checkpoint: str) -> dict[str, Any]:
    """The course of a checkpoint; empty where it cannot be read."""
    try:
        course = json.loads(folder.read(f"{checkpoint}/{COURSE}"))
    except (OSError, ValueError):
        return {}
    return course if isinstance(course, dict) else {}


def discard(folder: RunFolder, checkpoint: str) -> None:
    """Removes a checkpoint, or what was begun of it."""
    folder.files.remove(f"{checkpoint}/{MANIFEST}")  # first: half a checkpoint must not count
    folder.files.remove_folder(checkpoint)


def _begun(folder: RunFolder) -> list[str]:
    return [f"checkpoints/{name}" for name in folder.files.children("checkpoints") if name.startswith("step-")]


def _write(folder: RunFolder, name: str, content: bytes) -> WrittenFile:
    folder.write(name, content)
    return WrittenFile(name.rpartition("/")[2], len(content), hashlib.sha256(content).hexdigest())


def _digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while part := stream.read(PART_BYTES):
        digest.update(part)
    return digest.hexdigest()


def _differs(where: str) -> str:
    return f"{where} is not what was written: its SHA-256 differs"
