"""Checkpoints `checkpoints/step-<n>/` of a run folder: a file for each subproblem, the course, and a manifest.

The manifest is written last, and lists every file with its size and SHA-256: a folder without one is no checkpoint.
Whether one with it is whole, `whole` alone decides: what it refuses is never resumed from. What is passed over once has
a file `damaged` from then on, which says why, and counts no more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from popmtl.errors import CheckpointDamaged, FileDamaged, RequestError
from popmtl.method.front import Hypervolume
from popmtl.runs.folder import METRICS, RunFolder
from popmtl.runs.reading import passing_over
from popmtl.runs.records import Manifest, Record, Versioned, parse
from popmtl.runs.storage import PART_BYTES, said
from popmtl.text import cut, printable

VERSION = 4
MANIFEST, COURSE, DAMAGED = "manifest.json", "course.json", "damaged"
LONGEST_REASON = 1000
"""Characters that are shown of why a checkpoint was set aside."""


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
    try:
        return load(content), json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["numbers"])
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:  # whole, and yet not ours
        raise CheckpointDamaged(f"{where} is not a file of PopMTL's: {type(error).__name__}: {error}") from error


def commit(folder: RunFolder, checkpoint: str, files: Sequence[WrittenFile], course: Mapping[str, Any]) -> None:
    """Makes a checkpoint of the files that the actors have written: from here on it counts.

    Raises:
        OSError: it cannot be written.
    """
    # A run that goes on from here does not write the lines from before it again.
    folder.flush()
    with suppress(FileNotFoundError):
        folder.files.sync(METRICS)
    content = json.dumps({"version": VERSION, **course}).encode()
    everything = [*files, _write(folder, f"{checkpoint}/{COURSE}", content)]
    folder.files.remove(f"{checkpoint}/{DAMAGED}")
    manifest = json.dumps({"files": [asdict(file) for file in everything]}, indent=1)
    folder.write(f"{checkpoint}/{MANIFEST}", manifest.encode())
    folder.files.sync(checkpoint)
    folder.files.sync("checkpoints")


def checkpoints(folder: RunFolder) -> list[str]:
    """Committed checkpoints that were not set aside, the latest first."""
    return sorted((name for name, files in _begun(folder).items() if _counts(files)), reverse=True)


def whole(folder: RunFolder, checkpoint: str, *, contents: bool = True) -> tuple[list[WrittenFile], dict[str, Any]]:
    """What a checkpoint holds, if it is whole: the subproblems' files in their order, and its record (course.json).

    It is whole if its manifest lists the record, and the file of each subproblem that this knows of, once, and nothing
    else; if all of them are there and of the sizes and SHA-256 of their entries; and if the record is of this version
    and holds all that it should.

    Args:
        folder: of the run.
        checkpoint: its name there.
        contents: read every file; otherwise only the sizes of the subproblems' files are looked at.

    Raises:
        CheckpointDamaged: it is not; the first thing that is wrong, naming the file.
    """
    where = folder.files.where(f"{checkpoint}/{MANIFEST}")
    try:
        entries = [WrittenFile(**entry) for entry in folder.record(f"{checkpoint}/{MANIFEST}", Manifest)["files"]]
    except FileNotFoundError:
        raise CheckpointDamaged(f"{where} is missing") from None
    except FileDamaged as error:
        raise CheckpointDamaged(str(error)) from None
    except OSError as error:
        raise CheckpointDamaged(f"{where} cannot be read: {said(error)}") from error
    listed: dict[str, WrittenFile] = {}
    for entry in entries:
        if entry.name in listed:
            raise CheckpointDamaged(f"{where} is damaged: it lists {entry.name} twice")
        listed[entry.name] = entry
    names = [COURSE, *map(subproblem_file, range(max(1, len(entries) - 1)))]
    if lacking := [name for name in names if name not in listed]:
        raise CheckpointDamaged(f"{where} is damaged: it does not list {lacking[0]}")
    for name in names:
        _compare(folder, f"{checkpoint}/{name}", listed[name], contents=contents and name != COURSE)
    record = _record(folder, checkpoint, listed[COURSE])
    if (n := len(record["course"]["reseeds"])) != len(names) - 1:
        raise CheckpointDamaged(f"{where} is damaged: it lists {len(names) - 1} subproblems, and the run has {n}")
    return [listed[name] for name in names[1:]], record


class Whole(NamedTuple):
    """A checkpoint that is whole: its name, its record, and the subproblems' files in their order."""

    name: str
    record: dict[str, Any]
    files: list[WrittenFile]


def _last(folder: RunFolder, contents: bool) -> tuple[Whole | None, dict[str, str]]:
    """The latest whole checkpoint, and what is wrong with those that are passed over for it."""
    passed_over: dict[str, str] = {}
    for checkpoint in checkpoints(folder):
        try:
            files, record = whole(folder, checkpoint, contents=contents)
            return Whole(checkpoint, record, files), passed_over
        except CheckpointDamaged as error:  # noqa: PERF203  # seldom
            passed_over[checkpoint] = str(error)
    return None, passed_over


def last_of_run(folder: RunFolder, complain: Callable[[str], None], *, contents: bool = True) -> Whole | None:
    """The latest whole checkpoint; None for a run that never had one, and may begin again.

    What is passed over for another is set aside.

    Args:
        folder: of the run.
        complain: is told of each that is passed over.
        contents: as in `whole`.

    Raises:
        RequestError: it had some, and none is whole; what is wrong with each, naming the file. Or the storage fails.
    """
    try:
        found, passed_over = _last(folder, contents)
        for what in passed_over.values():
            complain(what)
        if found:
            for checkpoint, what in passed_over.items():
                set_aside(folder, checkpoint, what)
            return found
        begun = _begun(folder)
    except OSError as error:
        raise RequestError(f"{folder.files.where('checkpoints')} cannot be read or written: {said(error)}") from error
    complaints = list(passed_over.values())
    events = folder.events(passing_over)  # whoever resumes the run says so
    committed = {event["checkpoint"] for event in events if event["kind"] == "checkpoint"}
    for name, files in sorted(begun.items()):
        if DAMAGED in files:
            complaints.append(f"{folder.files.where(f'{name}/{DAMAGED}')} says why it was passed over")
        elif MANIFEST not in files and name in committed:
            complaints.append(f"{folder.files.where(f'{name}/{MANIFEST}')} is missing")
    if committed and not complaints:
        complaints = [f"{folder.files.where('checkpoints')} holds none of those that were written"]
    if complaints:
        raise RequestError(f"{folder.location}: no checkpoint is whole: {'; '.join(complaints)}")
    return None


def set_aside(folder: RunFolder, checkpoint: str, why: str) -> None:
    """Lets a damaged checkpoint count no more; its files stay, whatever they are.

    Raises:
        OSError: it cannot be said in its folder.
    """
    folder.write(f"{checkpoint}/{DAMAGED}", f"{why}\n".encode(errors="replace"))


def set_aside_of(folder: RunFolder) -> dict[str, str]:
    """The checkpoints that were `set_aside`, and why, in the order of their steps.

    Raises:
        OSError: the storage fails.
    """

    def reason(name: str) -> str:
        try:
            why = folder.bounded(f"{name}/{DAMAGED}").decode(errors="replace").strip()
        except RequestError as error:  # it is set aside all the same
            why = str(error)
        return cut(printable(why), LONGEST_REASON)

    return {name: reason(name) for name, files in sorted(_begun(folder).items()) if DAMAGED in files}


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
    for step in {(record_of(folder, checkpoint) or {}).get("best") for checkpoint in kept}:
        kept += checkpoints_at(folder, step) if step is not None else []
    if best and found:
        volumes = {checkpoint: hypervolume_of(record_of(folder, checkpoint)) for checkpoint in found}
        kept.append(max(found, key=lambda checkpoint: volume.value if (volume := volumes[checkpoint]) else -math.inf))
    for checkpoint in _begun(folder):
        if kept and checkpoint not in kept and checkpoint < kept[0]:
            discard(folder, checkpoint)


def checkpoints_at(folder: RunFolder, step: int) -> list[str]:
    """The committed checkpoints of a step, the latest first: the same rows, by the actors of different starts."""
    name = checkpoint_name(step)
    return [found for found in checkpoints(folder) if found == name or found.startswith(f"{name}-")]


def hypervolume_of(record: Mapping[str, Any] | None) -> Hypervolume | None:
    """The hypervolume of the last evaluation before a checkpoint; None of one whose record cannot be read."""
    last = record and record["course"]["last"]
    return Hypervolume(last["hypervolume"], last["hypervolume_error"]) if last else None


def record_of(folder: RunFolder, checkpoint: str) -> dict[str, Any] | None:
    """The record of a checkpoint, of which the rest may be damaged; None where it cannot be read."""
    with suppress(OSError, CheckpointDamaged):
        return _record(folder, checkpoint)
    return None


def discard(folder: RunFolder, checkpoint: str) -> None:
    """Removes a checkpoint, or what was begun of it."""
    folder.files.remove(f"{checkpoint}/{MANIFEST}")  # first: half a checkpoint must not count
    folder.files.remove_folder(checkpoint)


def _begun(folder: RunFolder) -> dict[str, list[str]]:
    """The folders of checkpoints, and what is in each."""
    names = [f"checkpoints/{name}" for name in folder.files.children("checkpoints") if name.startswith("step-")]
    return {name: folder.files.children(name) for name in names}


def _counts(files: Sequence[str]) -> bool:
    return MANIFEST in files and DAMAGED not in files


def _compare(folder: RunFolder, name: str, entry: WrittenFile, *, contents: bool) -> None:
    """Compares a file with its entry in the manifest.

    Raises:
        CheckpointDamaged: it differs, or is not there.
    """
    where = folder.files.where(name)
    try:
        found = folder.files.entry(name)
        if found is None:
            raise CheckpointDamaged(f"{where} is missing")
        if found.size != entry.size:
            raise CheckpointDamaged(f"{where} has {found.size} bytes, not {entry.size}")
        if contents:
            with folder.files.open(name) as stream:
                if _digest(stream) != entry.sha256:
                    raise CheckpointDamaged(_differs(where))
    except OSError as error:
        raise CheckpointDamaged(f"{where} cannot be read: {said(error)}") from error


def _record(folder: RunFolder, checkpoint: str, entry: WrittenFile | None = None) -> dict[str, Any]:
    """The record of a checkpoint, compared with its entry.

    Raises:
        CheckpointDamaged: it is none.
    """
    name = f"{checkpoint}/{COURSE}"
    where = folder.files.where(name)
    try:
        content = folder.bounded(name)
        if entry and hashlib.sha256(content).hexdigest() != entry.sha256:
            raise CheckpointDamaged(_differs(where))
        version = parse(Versioned, content, f"{where} is damaged")["version"]
        if version != VERSION:
            raise CheckpointDamaged(
                f"{where} is of version {version}, and this PopMTL reads version {VERSION}: it keeps other things of a "
                "run; finish the run by the PopMTL that began it, or train anew"
            )
        record: dict[str, Any] = parse(Record, content, f"{where} is damaged")
    except FileDamaged as error:
        raise CheckpointDamaged(str(error)) from None
    except OSError as error:
        raise CheckpointDamaged(f"{where} cannot be read: {said(error)}") from error
    return record


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
