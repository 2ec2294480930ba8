"""The end of a run. Its front.json is the commit.

    before      models, pictures, pareto/best; the lines of metrics.jsonl; in the journal, what only the run knows
    front.json  from here on the run has its front, and takes no more steps
    after       what MLflow is to get of the front, until it has everything; then "finished" in events.jsonl

All that comes after follows from the folder. So whoever is killed there, at any point, is followed by `complete`: it
adds what is lacking, and nothing twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from popmtl.runs.choice import finished_front
from popmtl.runs.folder import ENDS, RunFolder
from popmtl.runs.front import Front
from popmtl.runs.reading import passing_over
from popmtl.runs.trust import settings_of
from popmtl.tracking.links import Location
from popmtl.tracking.mlflow_sink import MlflowSink, Models
from popmtl.tracking.outbox import JOURNAL

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """What has become of a run's end.

    Attributes:
        complete: whether everything is there.
        location: the run in MLflow; None without tracking, or where MLflow was never reached.
        complaints: what went wrong or could be better, one message each.
    """

    complete: bool
    location: Location | None = None
    complaints: Sequence[str] = ()


def conclude(folder: RunFolder, front: Front, sink: MlflowSink | None, models: Models) -> Ended:
    """Does what comes after front.json, as far as it has not been done.

    Args:
        folder: the run's, which no other process works in.
        front: the Pareto set in it.
        sink: the run's, which is closed; None without tracking.
        models: which members' models are logged.
    """
    ended = Ended(complete=True)
    if sink:
        sink.log_end(front, models)
        complaints = sink.close("FINISHED")
        ended = Ended(sink.is_complete, sink.location, complaints)
    word = "finished" if ended.complete else "incomplete"
    words = [event["kind"] for event in folder.events(passing_over) if event["kind"] in (*ENDS, "started", "resumed")]
    if words[-1:] != [word]:
        figures = {"hypervolume": front.hypervolume, "hypervolume_error": front.hypervolume_error}
        folder.append_event(word, **figures, tracking=ended.complaints)
    return ended


def is_tracked(folder: RunFolder) -> bool:
    """Whether MLflow is to get what a run ends with."""
    tracking = settings_of(folder).get("tracking", {})
    return tracking.get("enabled", True) and folder.files.entry(JOURNAL) is not None


def complete_front(folder: RunFolder, sink: MlflowSink | None) -> Ended:
    """Brings what is lacking of a run that has its front.

    Args:
        folder: the run's, which no other process works in.
        sink: of its journal, reopened; None where nothing is to be sent.

    Raises:
        RequestError: its front.json is damaged.
    """
    models = settings_of(folder).get("tracking", {}).get("models", "front")
    return conclude(folder, finished_front(folder), sink, models)


def complete(folder: RunFolder, *, trust: bool = False, say: Callable[[str], object] = logger.info) -> Ended:
    """Sends what MLflow has not got of a run that has ended or was killed; one that has its front is finished then.

    Args:
        folder: the run's, which no other process works in.
        trust: as for `MlflowSink.reopen`.
        say: likewise.

    Raises:
        RequestError: see `MlflowSink.reopen`; or its front.json is damaged.
    """
    sink = MlflowSink.reopen(folder, trust=trust, say=say)
    if folder.has_front():
        return complete_front(folder, sink)
    complaints = sink.close(sink.closed or "KILLED")
    return Ended(sink.is_complete, sink.location, complaints)
