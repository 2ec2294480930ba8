"""What every JSON file of a run folder holds, and every line of one: none is read but through these schemas.

A folder may come from a disk that failed, or from a stranger. Whatever a file holds, who reads it gets what the schema
promises, or one line that names the file, its line, and what is wrong there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import NotRequired, TypedDict

from popmtl.errors import FileDamaged

FILE_BYTES = 2**24
"""The most that a JSON file, or a line of one, may have: 16 MiB. A thousand members take less, and whatever it holds,
it takes less than a GiB to find out."""

SHOWN = 60
"""Characters of a value that a complaint shows."""

# What is not named is left as it is: other versions write more.
OPEN, CLOSED = ConfigDict(strict=True, extra="allow"), ConfigDict(strict=True, extra="forbid")

Count = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = float | None  # null stands for what is not finite
Figures = dict[str, list[Number]]
Weights = list[Finite]
Subproblem = Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # a key of a JSON object is a text


def parse(schema: Any, content: bytes, where: str) -> Any:
    """The JSON in a file, or a line of one, as its schema has it.

    Args:
        schema: one of this module's.
        content: of the file or line.
        where: the file, and the line, as the message begins.

    Raises:
        FileDamaged: it is something else.
    """
    if len(content) > FILE_BYTES:
        raise FileDamaged(f"{where}: it goes on for more than {FILE_BYTES} bytes")
    try:
        return _adapter(schema).validate_json(content)
    except ValidationError as error:
        raise FileDamaged(f"{where}: {_reason(error)}") from None


def check(schema: Any, content: Any) -> None:
    """Compares what was read otherwise, as a part of another file, with its schema.

    Raises:
        FileDamaged: it is something else; the message names no file.
    """
    try:
        _adapter(schema).validate_python(content)
    except ValidationError as error:
        raise FileDamaged(_reason(error)) from None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _reason(error: ValidationError) -> str:
    """The first thing that is wrong, in a part of one line."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        why = first["msg"].removeprefix("Invalid JSON: ").replace(" at line 1 column", " at column")
        return f"it is not JSON: {why}"
    what = first["msg"].removeprefix("Value error, ")
    what = f"{what[0].lower()}{what[1:]}"
    # A union's part is in the place as well: a kind is worth naming, "other" is not, nor are pydantic's own names.
    places = [str(part) for part in first["loc"] if part != "other"]
    place = ".".join(part for part in places if re.fullmatch(r"[\w /%-]+", part))
    if first["type"] not in ("missing", "value_error"):
        value = first["input"]
        if isinstance(value, dict | list):
            what += ", not an object" if isinstance(value, dict) else ", not a list"
        else:
            shown = ascii(value[:SHOWN] if isinstance(value, str) else value)
            what += f", not {shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + '…'}"
    return f"{place}: {what}" if place else what


Line = dict[str, Any]
"""A line of a file that no schema is known of."""


# metrics.jsonl


@with_config(OPEN)
class Evaluation(TypedDict):
    """A line of metrics.jsonl: an evaluation on the validation split."""

    stage: Literal["mtgd", "aligned_mtl"]
    step: Count
    hypervolume: Number
    hypervolume_error: NotRequired[Number]
    front_size: NotRequired[Count]
    validation: NotRequired[list[list[Number]]]
    metrics: NotRequired[Figures]
    curves: NotRequired[Figures]


@with_config(ConfigDict(strict=True, extra="ignore"))
class Volume(TypedDict):
    """Of a line of metrics.jsonl, the hypervolume alone."""

    stage: Literal["mtgd", "aligned_mtl"]
    step: Count
    hypervolume: Number
    hypervolume_error: NotRequired[Number]


# events.jsonl


@with_config(OPEN)
class Event(TypedDict):
    """A line of events.jsonl."""

    time: str
    kind: str


@with_config(OPEN)
class Stopped(Event):
    """That training stopped early."""

    step: Count
    why: str


@with_config(OPEN)
class Committed(Event):
    """That a checkpoint counts."""

    step: Count
    checkpoint: str


@with_config(OPEN)
class Traced(Event):
    """What became of a trace."""

    trace: str


def _by_kind(*kinds: str) -> Discriminator:
    """Chooses a schema by "kind"; of one that is not among these, "other"."""

    def tag(value: Any) -> str:
        kind = value.get("kind") if isinstance(value, Mapping) else None
        return kind if isinstance(kind, str) and kind in kinds else "other"

    return Discriminator(tag)


AnyEvent = Annotated[
    Annotated[Stopped, Tag("stopped early")]
    | Annotated[Committed, Tag("checkpoint")]
    | Annotated[Traced, Tag("profile")]
    | Annotated[Event, Tag("other")],
    _by_kind("stopped early", "checkpoint", "profile"),
]


# tracking/


@with_config(OPEN)
class Entry(TypedDict):
    """A line of the journal for MLflow; of a kind that this version does not know, if it is nothing else."""

    time: Annotated[int, Field(ge=0, le=2**53)]
    kind: str
    key: NotRequired[str]


@with_config(OPEN)
class Opening(Entry):
    """Where to send what follows, and the population."""

    id: str
    uri: str
    experiment: str
    parent: str | None
    artifacts: str | None
    run_name: str
    config_name: str
    objectives: Annotated[list[str], Field(min_length=1)]
    weights: list[Weights]
    params: dict[str, str]
    changed: dict[str, str]


@with_config(OPEN)
class File(Entry):
    """A file of the run."""

    name: str
    place: NotRequired[str]


@with_config(OPEN)
class Evaluated(Entry):
    """An evaluation on the validation split."""

    step: Count
    hypervolume: Number
    hypervolume_error: NotRequired[Number]
    front_size: Count
    losses: list[list[Number]]
    metrics: NotRequired[Figures]


@with_config(OPEN)
class Curves(Entry):
    """Values of all members at some steps, shape (T, N, ·)."""

    steps: Annotated[list[Count], Field(min_length=1)]
    values: list[list[list[Number]]]


@with_config(OPEN)
class MembersFigures(Entry):
    """Figures of all members at a step."""

    step: Count
    figures: Figures


@with_config(OPEN)
class Told(Entry):
    """Something that happened to the run."""

    number: Count
    what: str
    text: str
    recoveries: Count


@with_config(OPEN)
class FrontTold(Entry):
    """That the front has been written, and its hypervolume."""

    step: Count
    hypervolume: Number
    hypervolume_error: NotRequired[Number]


@with_config(OPEN)
class SplitFigures(TypedDict):
    """A member's figures on a split."""

    objectives: list[Number]
    metrics: dict[str, Number]


@with_config(OPEN)
class MemberTold(Entry):
    """A member of the front."""

    subproblem: Count
    weights: Weights
    objectives: list[Number]
    metrics: dict[str, Number]
    validation: NotRequired[SplitFigures | None]
    stage: str
    non_dominated: bool
    model: str | None
    lost: str | None
    step: Count
    with_model: bool


@with_config(OPEN)
class AtStep(Entry):
    """What belongs to a step and holds nothing else."""

    step: Count


@with_config(OPEN)
class Closing(Entry):
    """What becomes of the run."""

    status: Literal["FINISHED", "FAILED", "KILLED"]


AnyEntry = Annotated[
    Annotated[Opening, Tag("opening")]
    | Annotated[File, Tag("file")]
    | Annotated[Evaluated, Tag("evaluation")]
    | Annotated[Curves, Tag("training losses")]
    | Annotated[Curves, Tag("stability")]
    | Annotated[MembersFigures, Tag("members' figures")]
    | Annotated[Told, Tag("event")]
    | Annotated[FrontTold, Tag("front")]
    | Annotated[MemberTold, Tag("subproblem")]
    | Annotated[AtStep, Tag("picker")]
    | Annotated[Closing, Tag("closing")]
    | Annotated[Entry, Tag("other")],
    _by_kind(
        *("opening", "file", "evaluation", "training losses", "stability", "members' figures", "event", "front"),
        *("subproblem", "picker", "closing"),
    ),
]


@with_config(CLOSED)
class CursorFile(TypedDict):
    """tracking/sent.json; see `popmtl.tracking.outbox.Sent`."""

    place: list[str | None]
    count: Count
    refused: list[Count]
    experiment_id: str | None
    parent: str | None
    members: dict[Subproblem, str]
    models: dict[Subproblem, str]
    versions: dict[str, str]


def _is_opened(cursor: CursorFile) -> CursorFile:
    done = cursor["count"] > len(cursor["refused"])
    if done and (cursor["parent"] is None or cursor["experiment_id"] is None):
        raise ValueError(f"{cursor['count']} entries were sent to no run")
    return cursor


Cursor = Annotated[CursorFile, AfterValidator(_is_opened)]


# pareto/front.json


@with_config(OPEN)
class MemberOfFront(SplitFigures):
    """A member; see `popmtl.runs.front.Member`."""

    subproblem: Count
    weights: Weights
    stage: Literal["mtgd", "aligned_mtl"]
    non_dominated: bool
    model: str | None
    reseeds: NotRequired[Count]
    lost: NotRequired[str | None]
    validation: NotRequired[SplitFigures | None]


@with_config(OPEN)
class FrontFile(TypedDict):
    """front.json; see `popmtl.runs.front.Front`."""

    objectives: Annotated[list[str], Field(min_length=1)]
    reference_point: Weights
    hypervolume: Number
    hypervolume_error: NotRequired[Number]
    seed: int
    steps: Count
    members: Annotated[list[MemberOfFront], Field(min_length=1)]
    metrics: NotRequired[dict[str, Literal["lower", "higher"]]]
    baseline: NotRequired[dict[str, Number]]
    best: NotRequired[bool]


def _has_lengths(front: FrontFile) -> FrontFile:
    m = len(front["objectives"])
    lengths = {"reference_point": len(front["reference_point"])}
    for i, member in enumerate(front["members"]):
        for of, name in ((member, f"members.{i}"), (member.get("validation"), f"members.{i}.validation")):
            if of:
                lengths[f"{name}.objectives"] = len(of["objectives"])
        lengths[f"members.{i}.weights"] = len(member["weights"])
    for name, length in lengths.items():
        if length != m:
            raise ValueError(f"{name} has {length} numbers, and there are {m} objectives")
    numbers = [member["subproblem"] for member in front["members"]]
    if len(set(numbers)) < len(numbers):
        raise ValueError("two members are of one subproblem")
    return front


FrontJson = Annotated[FrontFile, AfterValidator(_has_lengths)]


# checkpoints/


@with_config(CLOSED)
class FileEntry(TypedDict):
    """A file of a checkpoint."""

    name: Annotated[str, Field(pattern=r"^(course\.json|subproblem-[0-9]{5,9}\.safetensors)$")]
    size: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@with_config(CLOSED)
class Manifest(TypedDict):
    """manifest.json."""

    files: list[FileEntry]


@with_config(ConfigDict(strict=True, extra="ignore"))
class Versioned(TypedDict):
    """Of a course.json of any version, which one it is."""

    version: int


@with_config(OPEN)
class SeenState(TypedDict):
    """An evaluation; see `popmtl.method.course.Seen`."""

    step: Count
    hypervolume: Finite
    hypervolume_error: Finite | None


@with_config(OPEN)
class DepartureState(TypedDict):
    """How a row left."""

    subproblem: Count
    step: Count
    why: str


@with_config(OPEN)
class StopState(TypedDict):
    """See `popmtl.method.course.Stop`."""

    patience: Count | None
    min_improvement: Finite
    max_hours: Finite | None


@with_config(OPEN)
class CourseState(TypedDict):
    """See `popmtl.method.course.Course.state`."""

    step: Count
    ideal: Weights
    reference_point: Weights
    last: SeenState
    best: SeenState
    improved: Finite
    stale: Count
    out: list[DepartureState]
    reseeds: Annotated[list[Count], Field(min_length=1)]
    curves: dict[str, list[tuple[float, float]]]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    stopped: str | None
    stop: StopState


@with_config(OPEN)
class RecordFile(TypedDict):
    """course.json: where the run stands beside its rows.

    `step` counts both stages, `fine_tuned` those of the second alone; `best` is the step that a front of the best
    evaluation is to be made of, where one is asked for.
    """

    version: int
    step: Count
    fine_tuned: Count | None
    executions: list[Literal["loop", "stacked"]] | None
    untrained: dict[str, tuple[float, float]] | None
    course: CourseState
    best: Count | None
    identity: dict[str, Any]


def _is_of_one_run(record: RecordFile) -> RecordFile:
    course = record["course"]
    n, step = len(course["reseeds"]), course["step"]
    if len(course["reference_point"]) != len(course["ideal"]):
        raise ValueError("course.reference_point is not as long as course.ideal")
    for name, sums in course["curves"].items():
        if len(sums) != n:
            raise ValueError(f"course.curves.{name} is of {len(sums)} rows, and there are {n}")
    if any(departure["subproblem"] >= n for departure in course["out"]):
        raise ValueError(f"course.out has a row that is none of the {n}")
    if record["step"] != step + (record["fine_tuned"] or 0):
        raise ValueError(f"step is {record['step']}, and {step} of MTGD and {record['fine_tuned']} of fine-tuning")
    if not course["best"]["step"] <= course["last"]["step"] <= step:
        raise ValueError(f"course.best and course.last are later than step {step}")
    return record


Record = Annotated[RecordFile, AfterValidator(_is_of_one_run)]


@with_config(OPEN)
class StreamState(TypedDict):
    """Where a stream of batches stands."""

    drawn: Count
    epoch: Count
    within: Count
    own: Any


@with_config(OPEN)
class RowNumbers(TypedDict):
    """What a file of tensors holds of its row beside them; see `popmtl.method.snapshot.take`."""

    optimizer: dict[str, Any]
    out: bool
    largest_step: float
    largest_moments: NotRequired[list[float]]
    awaited: Any
    stream: StreamState
    extra: Any
    buffers: list[str]


# config.yaml, as far as commands go by it that check no more: a whole check imports an optimizer


@with_config(OPEN)
class ProblemSettings(TypedDict):
    """The problem; other keys are its parameters."""

    name: str


@with_config(OPEN)
class TrackingSettings(TypedDict):
    """What MLflow is to get."""

    enabled: NotRequired[bool]
    models: NotRequired[Literal["front", "all", "none"]]


@with_config(OPEN)
class Settings(TypedDict):
    """The config of a run."""

    problem: ProblemSettings
    tracking: NotRequired[TrackingSettings]


# origin.json


class Origin(BaseModel):
    """Where a run comes from.

    Attributes:
        file: the file that the problem's module was in; None of a built-in one.
        sha256: of its content; None where it could not be read.
        servers: tracking URIs that the user named, or that follow from the storage; without credentials.
        parents: runs of MLflow that the user named as the parent.
    """

    model_config = ConfigDict(strict=True)

    file: str | None = None
    sha256: str | None = None
    servers: list[str] = []
    parents: list[str] = []


class OriginFile(BaseModel):
    """The content of origin.json: several HMACs where config.yaml is about to be replaced."""

    model_config = ConfigDict(strict=True)

    origin: Origin
    hmac: list[str]


# .lock


@with_config(OPEN)
class Lease(TypedDict):
    """The file of a lease."""

    owner: str
    count: Count
